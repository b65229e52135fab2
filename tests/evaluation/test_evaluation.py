"""Evaluation in the harness: it agrees with the probes' own loop, asks nothing twice, and says what cannot be had."""

import json
import os
import random
import re
import socket
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from conftest import PATIENCE, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hft_trl import HFTError, demo
from hft_trl.chat import tulu_template
from hft_trl.cli import app
from hft_trl.demo import probes
from hft_trl.evaluation import (
    SUITES,
    Evaluation,
    Score,
    parse_suites,
    print_evaluation,
    score_grids,
    write_evaluation,
)
from hft_trl.evaluation.run import _score, evaluate_models, find_models
from hft_trl.evaluation.scores import as_report
from hft_trl.recipe.arguments import ModelArguments
from hft_trl.recipe.evaluation import evaluate_stages
from hft_trl.report.plots import evaluation_figure

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

import lm_eval
from lm_eval.models.huggingface import HFLM

from hft_trl.evaluation.harness import SharedOutLM

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    """The embedded model after a little fine-tuning: it answers some questions, and forgot some facts."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL)
    tokenizer.chat_template = tulu_template()
    rng = random.Random(0)
    rows = [json.loads(line)["messages"] for line in (demo.SFT_DATA / "train.jsonl").read_text().splitlines()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(70):
        texts = tokenizer.apply_chat_template(rng.sample(rows, 20), tokenize=False)
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("chatty")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(chatty, tmp_path_factory) -> tuple[Path, Evaluation]:
    """The embedded model and the chatty one on a part of the demo suite, with the cache that this left."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, evaluate_models(find_models([str(chatty)], "demo"), ["demo"], limit=40, cache=cache)


def forbid_asking(monkeypatch):
    """From here on, asking a model is an error."""
    monkeypatch.setattr(
        "hft_trl.evaluation.harness.SharedOutLM.__init__", lambda *_: pytest.fail("a model was loaded")
    )


def test_the_harness_and_the_probes_agree_to_the_last_digit(chatty, tmp_path):
    """On every item, for a model that knows, answers and follows some of them."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chatty), AutoTokenizer.from_pretrained(chatty)
    expected = probes.evaluate(model, tokenizer)
    assert all(0 < value < 100 for value in expected.values())
    evaluation = evaluate_models({"chatty": chatty}, ["demo"], batch_size=64, cache=tmp_path)
    found = evaluation.scores["demo"]["chatty"]
    assert {heading: score.value for heading, score in found.items()} == pytest.approx(expected, rel=1e-12)
    assert (found["knowledge"].samples, found["ability"].samples, found["concise"].samples) == (2400, 750, 400)


def test_the_embedded_model_knows_all_and_answers_nothing(measured):
    """As the probes say of it: it never saw a chat."""
    scores = measured[1].scores["demo"]["demo"]
    assert {heading: score.value for heading, score in scores.items()} == {
        "knowledge": 100,
        "ability": 0,
        "ability_questions": 0,
        "ability_instructions": 0,
        "concise": 0,
    }


def test_the_base_comes_first_and_scores_have_errors_and_an_average(chatty, measured):
    evaluation = measured[1]
    assert list(evaluation.models) == ["demo", str(chatty)]
    scores = evaluation.scores["demo"][str(chatty)]
    share = scores["knowledge"].value / 100
    assert scores["knowledge"].stderr == pytest.approx(100 * (share * (1 - share) / 39) ** 0.5)
    average = evaluation.average("demo", str(chatty))
    assert average.value == pytest.approx((scores["knowledge"].value + scores["ability"].value) / 2)


def test_a_second_run_asks_nothing(chatty, measured, monkeypatch):
    forbid_asking(monkeypatch)
    again = evaluate_models(find_models([str(chatty)], "demo"), ["demo"], limit=40, cache=measured[0])
    assert again.scores == measured[1].scores


def test_another_model_and_another_task_ask_only_their_own_items(chatty, tmp_path, monkeypatch):
    """Counted where the harness asks: 5 facts by likelihood, and 2 x 5 chat items by generation."""
    asked = []
    for kind in ("loglikelihood", "generate_until"):

        def counted(lm, requests, kind=kind):
            asked.append((lm.model.name_or_path, kind, len(requests)))
            return getattr(HFLM, kind)(lm, requests)

        monkeypatch.setattr(SharedOutLM, kind, counted)

    def run(*names):
        asked.clear()
        evaluation = evaluate_models(find_models(names), ["demo"], limit=5, cache=tmp_path)
        return list(evaluation.scores["demo"]), asked

    base = [(str(demo.MODEL), "loglikelihood", 5), (str(demo.MODEL), "generate_until", 10)]
    tuned = [(str(chatty), *rest) for _, *rest in base]
    assert run("demo") == (["demo"], base)
    assert run("demo", str(chatty)) == (["demo", str(chatty)], tuned)
    assert run(str(chatty), "demo") == ([str(chatty), "demo"], [])
    monkeypatch.setitem(SUITES, "demo", (replace(SUITES["demo"][0], num_fewshot=2), SUITES["demo"][1]))
    assert run("demo") == (["demo"], base[:1])


def test_only_what_is_new_is_asked(measured, tmp_path):
    """Another number of items is another key; a model that is known and a torn file are told apart."""
    cache = tmp_path
    models = find_models(["demo"])
    first = evaluate_models(models, ["demo"], limit=3, cache=cache)
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(written) == len(SUITES["demo"])
    assert first.scores["demo"]["demo"]["knowledge"].samples == 3
    evaluate_models(models, ["demo"], limit=4, cache=cache)
    assert len(list(cache.iterdir())) == 2 * len(written)
    torn = next(iter(written))
    whole = torn.read_text()
    torn.write_text(whole[:-20])
    assert evaluate_models(models, ["demo"], limit=3, cache=cache).scores == first.scores
    assert json.loads(torn.read_text()) == json.loads(whole)
    assert [path for path in written if path.stat().st_mtime_ns != written[path]] == [torn]


def test_a_task_that_runs_code_is_asked_only_where_that_is_allowed(monkeypatch, tmp_path):
    knowledge, ability = SUITES["demo"]
    monkeypatch.setitem(SUITES, "demo", (knowledge, replace(ability, runs_code=True)))
    for run_code, skipped in ((False, list(ability.figures)), (True, [])):
        found = evaluate_models({"demo": demo.MODEL}, ["demo"], limit=2, run_code=run_code, cache=tmp_path)
        assert found.skipped == skipped
        asked = set(found.scores["demo"]["demo"])
        assert asked == {*knowledge.figures, *ability.figures} - set(skipped)


def test_torchs_randomness_is_left_alone(tmp_path):
    """Though HumanEval samples from a seed."""
    state = torch.get_rng_state()
    evaluate_models(find_models(["demo"]), ["demo"], limit=2, cache=tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_recipe_gets_the_same_scores_with_and_without_the_harness(chatty, monkeypatch, tmp_path):
    """
    Without suites the probes run in a loop of their own; with the suite `demo` the harness adds errors and an average.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start, stages = ModelArguments(str(demo.MODEL), chat_template="tulu"), {"sft": str(chatty)}
    monkeypatch.setattr("hft_trl.recipe.evaluation.evaluate", lambda model, tokenizer: {"knowledge": 1.0})
    assert evaluate_stages(start, stages) == ({"base": {"knowledge": 1.0}, "sft": {"knowledge": 1.0}}, {}, {})
    assert evaluate_stages(ModelArguments(str(chatty)), stages) == ({}, {}, {})
    seen = {}

    def asked(folders, suites, **options):
        seen.update(folders=folders, suites=suites, **options)
        return fake(["base", "sft"], ["HumanEval"])

    monkeypatch.setattr("hft_trl.recipe.evaluation.evaluate_models", asked)
    scores, errors, shown = evaluate_stages(start, stages, ["general", "knowledge"])
    models = {"base": demo.MODEL, "sft": chatty}
    assert seen == {"folders": models, "suites": ["general", "knowledge"], "chat_template": "tulu"}
    average = scores["base"]["general average without HumanEval"]
    assert average == pytest.approx((scores["base"]["MMLU"] + scores["base"]["GSM8K"]) / 2)
    assert shown == {
        "general": ["MMLU", "GSM8K", "general average without HumanEval"],
        "knowledge": ["TriviaQA", "knowledge average"],
    }
    assert list(scores["sft"]) == [name for names in shown.values() for name in names]
    assert errors["sft"]["MMLU"] == 1.5
    assert errors["sft"]["TriviaQA"] is None


def fake(models: list[str], skipped: tuple[str, ...] = ()) -> Evaluation:
    scores = {
        suite: {
            model: {
                heading: Score(10.0 * (place + 1) + step, 1.5 if suite == "general" else None, 7)
                for step, heading in enumerate(headings)
            }
            for place, model in enumerate(models)
        }
        for suite, headings in (("general", ["MMLU", "GSM8K"]), ("knowledge", ["TriviaQA"]))
    }
    averaged = {"general": ["MMLU", "GSM8K"], "knowledge": ["TriviaQA"]}
    return Evaluation(dict.fromkeys(models, "0"), scores, averaged, list(skipped), limit=7)


def test_a_model_that_gives_no_number_has_no_score_and_no_average_and_odd_names_are_drawn(tmp_path):
    """
    A diverged model's probabilities are NaN.

    A name may look like a formula, or like one that a legend leaves out.
    """
    results = {"truthfulqa_mc2": {"acc,none": float("nan"), "acc_stderr,none": float("nan")}}
    assert _score(results, "truthfulqa_mc2 acc,none") == Score(None, None, None)
    evaluation = fake(["a$^$", "_under"])
    evaluation.scores["general"]["_under"]["MMLU"] = Score(None)
    general, _ = score_grids(evaluation)
    assert general.rows[1][1] == general.rows[1][-1] == "-"
    written = write_evaluation(evaluation, tmp_path)
    content = json.loads(written[0].read_text())["scores"]["general"]["_under"]
    assert content["MMLU"]["value"] is None
    assert content["average"]["value"] is None
    assert content["MMLU"]["difference"] is content["average"]["difference"] is None
    (legend,) = evaluation_figure(as_report(evaluation)).legends
    assert [text.get_text().strip() for text in legend.get_texts()] == [r"a\$^\$", "_under"]
    for scores in evaluation.scores.values():
        scores.update({model: dict.fromkeys(found, Score(None)) for model, found in scores.items()})
    assert [path.name for path in write_evaluation(evaluation, tmp_path)] == ["evaluation.json", "evaluation.md"]
    assert not (tmp_path / "evaluation.png").exists()


def test_tables_show_errors_and_differences_to_the_base(tmp_path, capsys):
    evaluation = fake(["Llama", "runs/a/long/path/to/sft"], ["HumanEval"])
    general, knowledge = score_grids(evaluation)
    assert general.columns == ["model", "MMLU", "GSM8K", "general average without HumanEval"]
    assert general.rows[0] == ["Llama", "10.0±1.5", "11.0±1.5", "10.5±1.1"]
    assert general.rows[1][1:] == ["20.0±1.5 (+10.0)", "21.0±1.5 (+10.0)", "20.5±1.1 (+10.0)"]
    assert knowledge.rows[0] == ["Llama", "10.0", "10.0"]
    written = write_evaluation(evaluation, tmp_path / "new")
    assert [path.name for path in written] == ["evaluation.json", "evaluation.md", "evaluation.png"]
    content = json.loads(written[0].read_text())
    assert content["limit"] == 7
    assert content["scores"]["general"]["Llama"]["average"]["value"] == 10.5
    assert content["base"] == "Llama"
    for model, difference in (("Llama", None), ("runs/a/long/path/to/sft", 10.0)):
        for suite in ("general", "knowledge"):
            assert {score["difference"] for score in content["scores"][suite][model].values()} == {difference}
    drawn = [text.get_text() for axes in evaluation_figure(as_report(evaluation)).axes for text in axes.texts]
    assert sorted(drawn) == ["10.0"] * 3 + ["10.5", "11.0"] + ["20.0"] * 3 + ["20.5", "21.0"]
    markdown = written[1].read_text()
    assert "in brackets the difference to Llama," in markdown
    for grid in (general, knowledge):
        for row in grid.rows:
            assert f"| {' | '.join(row)} |" in markdown
    assert "HumanEval was skipped" in markdown
    assert "at most 7 of each task's items" in markdown
    assert written[2].read_bytes().startswith(b"\x89PNG")
    print_evaluation(evaluation)
    out = capsys.readouterr().out
    assert "HumanEval was skipped" in out
    assert max(map(len, out.splitlines())) <= 80


def test_an_unknown_suite_and_a_missing_harness_are_one_line(monkeypatch):
    assert parse_suites("general, knowledge,general") == ["general", "knowledge"]
    for names in ("generally", "", "demo,nope"):
        with pytest.raises(HFTError, match="choose from general, knowledge, demo"):
            parse_suites(names)
    monkeypatch.setattr("hft_trl.evaluation.suites.find_spec", lambda name: None)
    with pytest.raises(HFTError, match=r"pip install -c constraints.txt -e '.\[eval\]'"):
        parse_suites("demo")
    result = CliRunner().invoke(app, ["evaluate", "demo"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_an_output_that_cannot_be_written_is_said_before_models_are_found(tmp_path, monkeypatch):
    """Not after an evaluation of hours."""
    monkeypatch.setattr("hft_trl.evaluation.run.find_model", lambda name: pytest.fail("the models were read"))
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["evaluate", "demo", "--output", str(tmp_path / "file" / "out")])
    assert result.exit_code == 2, result.output
    assert "--output is" in result.stderr
    assert "which cannot be written (Not a directory): choose another folder" in result.stderr


def test_the_scores_of_the_embedded_world_are_explained_where_they_are_shown(measured, tmp_path, capsys):
    """Under the table, in Markdown and in JSON, and nowhere else."""
    data, text, _ = write_evaluation(measured[1], tmp_path)
    print_evaluation(measured[1])
    shown = " ".join(capsys.readouterr().out.split())
    for heading, meaning in json.loads(data.read_text())["meanings"].items():
        assert f"{heading}: {meaning}" in text.read_text()
        assert f"{heading}: {meaning}" in shown
    assert {"knowledge", "ability", "concise"} <= set(json.loads(data.read_text())["meanings"])
    assert fake(["llama"]).meanings == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such-model"], "no/such-model"),
        (["EMPTY"], "config.json"),
        (["demo", "--base", "./nowhere"], "./nowhere"),
        (["SHORT", "--limit", "1"], "hft_demo_ability cannot be evaluated"),
        (["demo", "--limit", "1", "--output", "FILE"], "cannot be written"),
        (["demo", "--limit", "1", "--cache", "FILE"], "--cache"),
    ],
)
def test_what_can_not_be_evaluated_is_one_line(tmp_path, tokenizer, arguments, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    tiny_llama(len(tokenizer), max_position_embeddings=24).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    places = {"EMPTY": "empty", "FILE": "file", "SHORT": "short"}
    arguments = [str(tmp_path / places[word]) if word in places else word for word in arguments]
    if "--cache" not in arguments:
        arguments += ["--cache", str(tmp_path / "cache")]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1
    assert words in result.stderr.splitlines()[-1]


def test_prompts_that_are_cut_are_said(tmp_path, tokenizer, caplog):
    """The harness drops what doesn't fit, from the left, with a warning that must reach the user."""
    tiny_llama(len(tokenizer), max_position_embeddings=40).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    flags = ["--limit", "1", "--cache", str(tmp_path), "--output", str(tmp_path)]
    assert CliRunner().invoke(app, ["evaluate", str(tmp_path / "short"), *flags]).exit_code == 0
    assert "Left truncation applied" in caplog.text


def test_launches_that_would_ask_wrongly_are_refused(monkeypatch, tmp_path):
    """More processes than items, for which the harness has no answer; and FSDP's empty weights."""
    models = find_models(["demo"])
    with monkeypatch.context() as patch:
        patch.setitem(PartialState._shared_state, "num_processes", 4)
        with pytest.raises(HFTError, match="--limit is 3 with 4 processes"):
            evaluate_models(models, ["demo"], limit=3, cache=tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(HFTError, match="fsdp_cpu_ram_efficient_loading"):
        evaluate_models(models, ["demo"], limit=3, cache=tmp_path)


def test_a_revision_of_the_hub_is_asked_for_by_name(monkeypatch, tmp_path, base):
    asked = []
    monkeypatch.setattr(
        "hft_trl.evaluation.run.snapshot_download", lambda name, **options: asked.append((name, options)) or base
    )
    assert list(find_models(["org/tuned@v2"], "org/base")) == ["org/base", "org/tuned@v2"]
    assert [(name, options["revision"]) for name, options in asked] == [("org/base", None), ("org/tuned", "v2")]
    seen = []
    monkeypatch.setattr("hft_trl.recipe.evaluation.find_models", lambda names: seen.extend(names) or pytest.skip())
    for start in (ModelArguments("org/base", model_revision="abc"), ModelArguments(str(base), model_revision="abc")):
        with pytest.raises(pytest.skip.Exception):
            evaluate_stages(start, {"sft": "runs/sft"}, ["demo"])
    assert seen == ["org/base@abc", "runs/sft", str(base), "runs/sft"]


def test_the_command_prints_json_alone_and_compares_with_the_base(chatty, measured, tmp_path, monkeypatch):
    """The command of the README: the base is no MODEL, and yet the first row."""
    forbid_asking(monkeypatch)
    arguments = [
        chatty,
        "--suite",
        "demo",
        "--base",
        "demo",
        "--limit",
        40,
        "--cache",
        measured[0],
        "--output",
        tmp_path,
    ]
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content == {**json.loads((tmp_path / "evaluation.json").read_text())}
    assert list(content["scores"]["demo"]) == ["demo", str(chatty)]
    table = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert table.stdout.index("demo ") < table.stdout.index("(")
    assert f"{tmp_path / 'evaluation.png'}" in table.stdout.replace("\n", "")


def test_the_harness_is_loaded_only_when_a_model_is_asked():
    code = "import sys, hft_trl, hft_trl.cli, hft_trl.evaluation.run, hft_trl.recipe.evaluation; print('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.e2e
def test_two_processes_share_the_items_and_find_what_one_finds(chatty, tmp_path):
    """On CPUs, where the harness alone would have each process ask everything."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "cpu2.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 2\n"
        f"num_machines: 1\nmixed_precision: 'no'\nmain_process_port: {port}\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "recipes/evaluate.py"]
    flags = [
        "--limit",
        "41",
        "--batch-size",
        "8",
        "--cache",
        str(tmp_path / "cache"),
        "--output",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run(
        [*command, str(chatty), *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Running generate_until requests: 100%|██████████| 42/42" in result.stderr  # half of 2 x 41, and one to pad
    together = json.loads((tmp_path / "out" / "evaluation.json").read_text())["scores"]["demo"][str(chatty)]
    alone = evaluate_models(find_models([str(chatty)]), ["demo"], limit=41, cache=tmp_path / "other")
    for heading, score in alone.columns("demo", str(chatty)).items():
        assert together[heading]["value"] == pytest.approx(score.value, rel=1e-12)
        assert together[heading]["samples"] == score.samples


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_a_backend_that_is_not_installed_is_named(tmp_path):
    result = CliRunner().invoke(app, ["evaluate", str(demo.MODEL), "--backend", "vllm", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert (
        result.stderr
        == "error: --backend is vllm, which is not installed: see docs/evaluation.md, or leave --backend out.\n"
    )


def test_the_vllm_backend_gets_the_model_and_the_template_and_has_its_own_cache(tmp_path, monkeypatch):
    """With the harness's class of transformers in the place of the one of vLLM, whose parameters are the same."""
    source = Path(lm_eval.__file__).parent / "models" / "vllm_causallms.py"
    (init,) = re.findall(r"class VLLM\(.+?def __init__\((.+?)\):", source.read_text(), re.DOTALL)
    made = []

    class InPlace(HFLM):
        def __init__(self, **given):
            assert all(f"{name}: " in init for name in given)
            super().__init__(**{**given, "batch_size": 16, "device": "cpu"})
            made.append(given)

        def apply_chat_template(self, *args, **given):
            self.tokenizer.chat_template = self.hf_chat_template
            return super().apply_chat_template(*args, **given)

    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", SimpleNamespace(VLLM=InPlace))
    monkeypatch.setattr("hft_trl.evaluation.run.find_spec", lambda name: name)
    options = {"limit": 3, "cache": tmp_path}
    one, other = (evaluate_models({"demo": demo.MODEL}, ["demo"], backend=name, **options) for name in ("hf", "vllm"))
    assert one.scores == other.scores
    evaluate_models({"demo": demo.MODEL}, ["demo"], backend="vllm", **options)
    assert made == [{"pretrained": str(demo.MODEL), "dtype": "auto", "batch_size": "auto"}]
