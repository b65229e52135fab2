"""Files and settings that are broken or hostile: one line and exit code 2, or success; what exists stays as it is."""

import copy
import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from conftest import parse_recipe, tiny_llama
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reports import stage
from rich.console import Console
from test_continual_report import scores_of
from trl import SFTConfig

from hft_trl import HFTConfig, demo, exit_on_user_error, select
from hft_trl.chat import chat, load_tokenizer
from hft_trl.checkpoints.whole import MANIFEST_FILE, check_whole, last_whole_checkpoint
from hft_trl.continual.continual_recipe import parse_continual
from hft_trl.continual.report import compare
from hft_trl.continual.run_folder import check_plan
from hft_trl.evaluation.run import _read, _score, _write
from hft_trl.recipe import parse_stage
from hft_trl.recipe.folder import LOCK_FILE, finished, open_stages
from hft_trl.recipe.folder import settings as stage_settings
from hft_trl.recipe.rows import check_rendered
from hft_trl.report import Report, print_report
from hft_trl.report.tables import Grid, rich_table
from hft_trl.saved_models.half_reset import half_reset
from hft_trl.saved_models.saved_model import SavedModel
from hft_trl.selection import Selection
from hft_trl.skeleton import build_on_meta
from hft_trl.weights import weight_files

# The same examples in every run; each is quick, and the machine may be busy
FUZZ = settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

WORDS = st.text(max_size=8) | st.sampled_from(["[/x]", "../x", "/etc/passwd", "nan", "{{ x }}", "\0", "\ud800", "hft"])
# No large integers: a config of a million layers is a model of a million layers
SCALARS = st.none() | st.booleans() | st.integers(-2, 40) | st.floats() | WORDS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6
)
DEEP = "[" * 100_000


def outcome(call: Callable[[], object], capsys: pytest.CaptureFixture) -> str:
    """What a command says that makes this call: nothing, or one line. Anything but an `HFTError` is raised on."""
    capsys.readouterr()
    code: object = 0
    try:
        with exit_on_user_error():
            call()
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == (2 if errors else 0)
    assert len(errors) <= 1
    return "".join(errors)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK_FILE
    }


def places(content: object, at: tuple = ()) -> list[tuple]:
    """Where in nested content a value can be put or taken out."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place for key, value in inner for place in ((*at, key), *places(value, (*at, key)))]


@st.composite
def damaged(draw: st.DrawFn, text: str) -> bytes:
    """A JSON file with one value exchanged or taken out, cut short, of another kind, or no JSON at all."""
    kind = draw(st.sampled_from(["value", "value", "value", "gone", "gone", "cut", "other", "bytes", "deep"]))
    if kind == "cut":
        return text.encode()[: draw(st.integers(0, len(text) - 1))]
    if kind == "bytes":
        return draw(st.binary(max_size=20))
    if kind == "deep":
        return DEEP.encode()
    if kind == "other":
        return json.dumps(draw(VALUES)).encode()
    content = copy.deepcopy(json.loads(text))
    *way, last = draw(st.sampled_from(places(content)))
    inner = content
    for key in way:
        inner = inner[key]
    if kind == "gone":
        del inner[last]
    else:
        inner[last] = draw(VALUES)
    return json.dumps(content).encode()


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> Path:
    """A model in two shards, trained by half, with a tokenizer and a finished stage's files."""
    folder = tmp_path_factory.mktemp("hostile") / "sft"
    built = tiny_llama(len(tokenizer))
    built.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    chosen = select(built, HFTConfig())
    chosen.save(folder)
    return folder


def read_selection(folder: Path) -> None:
    Selection.load(folder)


def read_model(folder: Path) -> None:
    build_on_meta(str(folder))


def read_weights(folder: Path) -> None:
    weight_files(str(folder))
    SavedModel(str(folder))


def read_tokenizer(folder: Path) -> None:
    load_tokenizer(str(folder))


MODEL_FILES = {
    "config.json": read_model,
    "model.safetensors.index.json": read_weights,
    "hft_selection.json": read_selection,
    "tokenizer.json": read_tokenizer,
    "tokenizer_config.json": read_tokenizer,
}


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_damaged_file_of_a_model_is_one_line(model, tmp_path, capsys, name):
    original = (model / name).read_text()
    folder = tmp_path / "model"
    shutil.copytree(model, folder)

    @FUZZ
    @given(damaged(original))
    def fuzzed(content):
        (folder / name).write_bytes(content)
        before = digests(tmp_path)
        outcome(lambda: MODEL_FILES[name](folder), capsys)
        assert digests(tmp_path) == before

    fuzzed()


SFT = stage()


def read_report(folder: Path) -> None:
    print_report(Report.load(folder))


def read_scores(folder: Path) -> None:
    compare([folder])


def read_plan(folder: Path) -> None:
    check_plan(folder, {"approach": "sequential", "tasks": ["A", "B"]})


RESULTS = {
    "report.json": (
        read_report,
        {**asdict(Report(stages=[SFT], evaluation={"base": {"a": 1.0}})), "settings": {"a": 1}},
    ),
    "scores.json": (read_scores, scores_of()),
    "plan.json": (read_plan, {"approach": "sequential", "tasks": ["A", "B"]}),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_damaged_result_of_a_run_is_one_line(tmp_path, capsys, name):
    read, content = RESULTS[name]
    original = json.dumps(content)

    @FUZZ
    @given(damaged(original))
    def fuzzed(content):
        (tmp_path / name).write_bytes(content)
        before = digests(tmp_path)
        outcome(lambda: read(tmp_path), capsys)
        assert digests(tmp_path) == before

    fuzzed()


def test_a_damaged_stage_file_is_one_line_and_nothing_is_removed(model, tmp_path, capsys):
    folder = tmp_path / "sft"
    shutil.copytree(model, folder)
    recipe = parse_recipe(["--output_dir", str(tmp_path)], default_config=demo.RECIPE)
    original = json.dumps({"settings": stage_settings(recipe.stages["sft"]), "record": asdict(SFT)})

    @FUZZ
    @given(damaged(original))
    def fuzzed(content):
        (folder / "stage.json").write_bytes(content)
        before = digests(tmp_path)
        said = outcome(lambda: (open_stages([recipe.stages["sft"]]), finished(recipe.stages["sft"])), capsys)
        after = digests(tmp_path)
        assert after == before or (not said and after.keys() == before.keys())

    fuzzed()


def test_a_damaged_checkpoint_is_passed_over_or_one_line(model, tmp_path, capsys):
    """Its own state, its manifest and an adapter's config are read before training."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(model, folder)
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).write_bytes(b"x")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": []}))
    manifest = json.dumps({"files": {path.name: path.stat().st_size for path in folder.iterdir()}})
    originals = {"trainer_state.json": (folder / "trainer_state.json").read_text(), MANIFEST_FILE: manifest}

    @FUZZ
    @given(st.sampled_from(["trainer_state.json", MANIFEST_FILE]), st.data())
    def fuzzed(name, data):
        path = folder / name
        path.write_bytes(data.draw(damaged(originals[name])))
        before = digests(tmp_path)
        outcome(lambda: last_whole_checkpoint(tmp_path), capsys)
        outcome(lambda: check_whole(folder, 1), capsys)
        assert digests(tmp_path) == before
        path.write_text(originals[name])
        (folder / MANIFEST_FILE).unlink(missing_ok=True)

    fuzzed()


def test_a_damaged_cache_entry_is_measured_again(tmp_path):
    key = {"model": "x"}
    _write(tmp_path, key, {"task": {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 3}})
    (path,) = tmp_path.iterdir()
    original = path.read_text()

    @FUZZ
    @given(damaged(original))
    def fuzzed(content):
        path.write_bytes(content)
        found = _read(tmp_path, key)
        if found is not None:
            _score(found, "task acc,none")

    fuzzed()


PARSERS: dict[str, Callable[[list[str]], object]] = {
    "sft_then_dpo": lambda argv: parse_recipe(argv, default_config=demo.RECIPE),
    "sft": lambda argv: parse_stage("sft", SFTConfig, argv),
    "continual": lambda argv: parse_continual(argv, default_config=demo.CONTINUAL_RECIPE),
}
KEYS = st.sampled_from([
    "output_dir", "method", "overwrite", "evaluate", "model", "hft", "sft", "dpo", "lora", "env", "ratio", "seed", "exclude",
    "strategy", "dataset", "split", "learning_rate", "max_steps", "dataloader_num_workers", "model_init_kwargs", "dtype",
    "per_device_train_batch_size", "max_length", "dataset_mixture", "loss_type", "optim", "lr_scheduler_type", "fsdp",
    "logging_steps", "warmup_steps", "report_to", "eval_strategy", "chat_template", "benchmark", "tasks", "order", "approach",
    "r", "target_modules", "nonsense",
])  # fmt: skip
NUMBERS = st.sampled_from(
    [-1, 0, 10**400, 1e400, -1e400, float("nan"), 2**63, b"\xff", datetime.date(2020, 1, 1), {1, 2}]
)
CONTENTS = st.recursive(
    SCALARS | NUMBERS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture
def _no_environment_is_left():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("_no_environment_is_left")
@pytest.mark.parametrize("recipe", PARSERS)
def test_a_config_of_any_content_is_one_line_or_a_recipe(tmp_path, capsys, recipe):
    path = tmp_path / "config.yaml"

    @FUZZ
    @given(st.dictionaries(KEYS, CONTENTS, max_size=4).map(yaml.dump) | st.text(max_size=30) | st.just(DEEP))
    def fuzzed(content):
        path.write_bytes(content.encode(errors="surrogatepass"))
        before = digests(tmp_path)
        outcome(lambda: PARSERS[recipe](["--config", str(path), "--output_dir", str(tmp_path / "run")]), capsys)
        assert digests(tmp_path) == before

    fuzzed()


@pytest.mark.parametrize("recipe", PARSERS)
def test_flags_of_any_content_are_one_line_or_a_recipe(tmp_path, capsys, recipe):
    sections = st.sampled_from(["", "sft.", "dpo.", "hft.", "model.", "lora.", "other."])
    values = SCALARS.map(str) | st.sampled_from(["1e400", "nan", "9" * 400, "[", "{}", "--", "-", "auto"])
    flag = st.builds(lambda section, key, value: [f"--{section}{key}", value], sections, KEYS, values)

    @FUZZ
    @given(st.lists(flag, min_size=1, max_size=3))
    def fuzzed(flags):
        outcome(lambda: PARSERS[recipe](["--output_dir", str(tmp_path), *itertools.chain(*flags)]), capsys)
        assert not list(tmp_path.iterdir())

    fuzzed()


TEMPLATES = [
    "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages.__class__.__mro__ }}", "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ messages[5].content }}", "{{ x.y.z }}", "{% if %}", "{{ messages | nonsense }}", "{{ messages[0]['content'] + 1 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_raises_or_is_stopped_is_one_line(tokenizer, tmp_path, capsys, template):
    """Where a model is asked, and where rows are rendered."""
    (tmp_path / "own.jinja").write_text(template)
    tokenizer.save_pretrained(tmp_path)
    own = load_tokenizer(str(tmp_path), str(tmp_path / "own.jinja"))
    assert "chat_template to" in outcome(lambda: chat(tiny_llama(len(tokenizer)), own, ["Hi"]), capsys)
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    assert "the chat template rejects it" in outcome(lambda: check_rendered(own, rows, "data"), capsys)


@pytest.mark.parametrize("template", [b"\xff\xfe", None])
def test_a_template_file_that_is_no_text_is_one_line(tokenizer, tmp_path, capsys, template):
    tokenizer.save_pretrained(tmp_path)
    if template is not None:
        (tmp_path / "own.jinja").write_bytes(template)
    assert "chat_template" in outcome(lambda: load_tokenizer(str(tmp_path), str(tmp_path / "own.jinja")), capsys)


@pytest.mark.parametrize("output", ["loop", "loop/inner", "file/inner", "y" * 300, "a\0b"])
def test_an_output_that_can_be_no_folder_is_one_line(tmp_path, capsys, output):
    """Of a recipe, a plan, a new model and a comparison: a link to itself, a path in a file, a name too long."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("mine")
    before, place = digests(tmp_path), tmp_path / output
    recipe = parse_recipe([], default_config=demo.RECIPE)
    sft = dataclasses.replace(recipe.stages["sft"], args=copy.copy(recipe.stages["sft"].args))
    sft.args.output_dir = str(place)
    assert outcome(lambda: open_stages([sft]), capsys)
    if "\0" not in output:  # which no argument of a program can hold
        assert outcome(lambda: half_reset("demo", "demo", place), capsys)
        assert outcome(lambda: Report(stages=[SFT]).save(place), capsys)
    assert digests(tmp_path) == before


@given(st.text(max_size=12) | st.sampled_from(["[/x]", "a\\[/x]", "[red]", "x\\"]))
def test_a_name_with_markup_is_shown_as_it_is(name):
    """A model's name, a task's or a column's is no markup of the terminal."""
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    console.print(rich_table(Grid(name, [name, "b"], [[name, "1"]])))
    if name.isalnum() and name.isascii():
        assert shown.getvalue().count(name) >= 3
