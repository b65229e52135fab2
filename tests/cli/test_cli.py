"""The command line: what it prints, what it says when it cannot, and what it doesn't load."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import tiny_llama
from transformers import BertConfig
from typer.testing import CliRunner

from hft_trl import HFTConfig, select
from hft_trl.cli import app


@pytest.fixture
def folder(tmp_path):
    """A folder that holds a config and nothing else."""
    tiny_llama(300).config.save_pretrained(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def as_json(*arguments):
    result = run("select", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_select_prints_what_a_first_stage_would_train(folder):
    """The table and the picture show the selection that `select` draws, from the config alone."""
    result = run("select", folder)
    assert result.exit_code == 0, result.output
    assert "What a first stage" in result.stdout
    assert select(tiny_llama(300), HFTConfig()).digest[:16] in result.stdout
    assert "50.00 %" in result.stdout
    assert result.stdout.splitlines().count("") >= 3
    assert "post_attn" in result.stdout


def test_json_is_one_object_with_the_selection(folder):
    """Standard output is JSON and nothing else, with the documented keys."""
    found = as_json(folder)
    expected = select(tiny_llama(300), HFTConfig())
    assert list(found) == ["model", "stored", "config", "seed", "share", "digest", "categories", "trainable", "frozen"]
    assert found["stored"] is False
    assert found["digest"] == expected.digest
    assert tuple(found["trainable"]) == expected.trainable
    assert tuple(found["frozen"]) == expected.frozen
    assert [row["category"] for row in found["categories"]][-1] == "model"
    assert found["categories"][-1]["parameters"] == tiny_llama(300).num_parameters()


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        (["--ratio", "0.3"], {"ratio": 0.3}),
        (["--strategy", "layer"], {"strategy": "layer"}),
        (["--strategy", "element", "--ratio", "0.25"], {"strategy": "element", "ratio": 0.25}),
        (["--seed", "7"], {"seed": 7}),
        (["--exclude", "o_proj", "--exclude", "norm"], {"exclude": ["o_proj", "norm"]}),
        (["--no-train-embeddings"], {"train_embeddings": False}),
        (["--no-train-lm-head", "--no-train-final-norm"], {"train_lm_head": False, "train_final_norm": False}),
    ],
)
def test_flags_are_the_settings(folder, flags, setting):
    """Each flag sets the field of its name, and the others keep their defaults."""
    assert as_json(folder, *flags)["digest"] == select(tiny_llama(300), HFTConfig(**setting)).digest


def test_single_elements_are_said_to_learn(folder):
    result = run("select", folder, "--strategy", "element", "--ratio", "0.25")
    assert "a matrix with 25.00% of its elements learning" in result.stdout
    assert "25.00 %" in result.stdout


@pytest.mark.parametrize("importance", ["weight_norm", "snr"])
def test_importance_reads_the_weights_where_they_are_enough(tmp_path, importance):
    config = HFTConfig(strategy="importance", importance=importance)
    model = tiny_llama(300)
    model.save_pretrained(tmp_path)
    flags = ["--strategy", "importance", "--importance", importance]
    assert as_json(tmp_path, *flags)["digest"] == select(model, config).digest
    for source, importance_, message in (
        ("meta-llama/Llama-2-7b-hf", importance, "holds no model.safetensors"),
        (tmp_path, "wanda", "needs a trainer with its data"),
    ):
        result = run("select", source, "--strategy", "importance", "--importance", importance_)
        assert result.exit_code == 2
        assert message in result.stderr


def test_stored_selection_is_shown_as_such(folder):
    """A model that was trained with HFT shows the half that it was trained with, excluded parts left out."""
    stored = select(tiny_llama(300), HFTConfig(seed=5, exclude=["o_proj"]))
    stored.save(folder)
    result = run("select", folder)
    assert "was trained with this half" in result.stdout
    found = as_json(folder)
    assert (found["stored"], found["digest"]) == (True, stored.digest)
    assert found["categories"][0]["units"] == 3 * 4


def test_the_stored_selection_is_that_of_the_revision(folder, tmp_path_factory, monkeypatch):
    """Not that of the main branch, which has none."""
    cache = tmp_path_factory.mktemp("cache")
    repository = cache / "models--org--model"
    for name, number in (("main", "1"), ("v2", "2")):
        shutil.copytree(folder, repository / "snapshots" / (number * 40))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(number * 40)
    trained = select(tiny_llama(300), HFTConfig(seed=7))
    trained.save(repository / "snapshots" / ("2" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert as_json("org/model")["stored"] is False
    found = as_json("org/model", "--revision", "v2")
    assert (found["stored"], found["digest"]) == (True, trained.digest)


@pytest.mark.parametrize("reselect", ["fresh", "same", "complement"])
def test_settings_show_the_next_stage(folder, reselect):
    """With a setting, the next stage's draw is shown, which follows on from the stored selection."""
    model = tiny_llama(300)
    stored = select(model, HFTConfig(seed=5))
    stored.save(folder)
    found = as_json(folder, "--reselect", reselect)
    assert found["stored"] is False
    assert found["digest"] == select(model, HFTConfig(reselect=reselect), previous=stored).digest
    assert "next stage" in run("select", folder, "--reselect", reselect).stdout


def bert(folder):
    BertConfig(hidden_size=8, num_attention_heads=1, architectures=["BertForMaskedLM"]).save_pretrained(folder)


def damaged_selection(folder):
    tiny_llama(300).config.save_pretrained(folder)
    (folder / "hft_selection.json").write_text("{}")


def selection_of_another_model(folder):
    tiny_llama(300).config.save_pretrained(folder)
    select(tiny_llama(300, num_hidden_layers=6), HFTConfig()).save(folder)


def no_json(folder):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    "prepare", [lambda folder: None, bert, damaged_selection, selection_of_another_model, no_json]
)
def test_bad_model_is_one_line_and_exit_code_2(tmp_path, prepare):
    """A folder without a usable causal LM or selection: one line on standard error, nothing on standard output."""
    prepare(tmp_path)
    result = run("select", tmp_path, "--json")
    assert_one_line(result)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./nowhere", "a/b/c", "no such name"])
def test_model_that_cannot_be_found_is_one_line(name):
    """A hub that cannot be reached and a path that leads nowhere: one line with the name."""
    result = run("select", name)
    assert_one_line(result)
    assert name in result.stderr


@pytest.mark.parametrize(
    "flags",
    [["--ratio", "1.5"], ["--ratio", "0"], ["--exclude", "("], ["--exclude", "matches_nothing"], ["--exclude", "."]],
)
def test_bad_setting_is_one_line(folder, flags):
    """A setting out of its range: one line that shows it."""
    result = run("select", folder, *flags)
    assert_one_line(result)
    assert flags[1] in result.stderr


def assert_one_line(result):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["select", "x", "--rato", "0.3"], ["select", "x", "--strategy", "odd"], ["sel"], ["select"]])  # fmt: skip
def test_bad_usage_is_exit_code_2(arguments):
    """Unknown flags, values and commands are told apart from results by the exit code, too."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_help_loads_nothing_heavy():
    """`--help` and `--version` load neither torch nor what is built on it, so they answer at once."""
    code = (
        "import sys; sys.argv = ['hft-trl', sys.argv[1]]\n"
        "from hft_trl.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'accelerate', 'datasets', 'bitsandbytes', 'numpy', 'matplotlib', 'lm_eval'} & set(sys.modules); assert not heavy, heavy"
    )
    for flag, text in (("--help", "select"), ("--version", ".")):
        found = subprocess.run([sys.executable, "-c", code, flag], check=True, capture_output=True, text=True)
        assert text in found.stdout


def test_console_script_keeps_standard_output_pure(folder):
    """In a process of its own, with every warning on, standard output is JSON alone and standard error is empty."""
    command = [sys.executable, "-c", "from hft_trl.cli import main; main()", "select", str(folder), "--json"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(found.stdout)["model"] == str(folder)
    assert found.stderr == ""


def test_plain_terminal_gets_plain_characters(folder):
    """Where the terminal has no Unicode, the picture is drawn in ASCII."""
    command = [sys.executable, "-c", "from hft_trl.cli import main; main()", "select", str(folder)]
    environment = {"PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, check=True, capture_output=True, env=environment)
    assert b"# learns" in found.stdout
    assert found.stdout.isascii()


def test_a_built_in_shape_needs_no_network_unless_a_folder_has_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = as_json("meta-llama/Llama-3.2-1B")
    assert {row["category"]: row["share"] for row in found["categories"]}["attention"] == 0.5
    tiny_llama(300).config.save_pretrained(tmp_path / "meta-llama" / "Llama-3.2-1B")
    own = as_json("meta-llama/Llama-3.2-1B")
    assert own["digest"] != found["digest"]
