"""
reproduce.py:

every model of the paper's questions is made once, goes on where it stopped, and is compared seed by seed.
"""

import json
import math
import runpy
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest
import torch
from conftest import PATIENCE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hft_trl import HFTError, demo
from hft_trl.demo import probes
from hft_trl.experiments import trials
from hft_trl.experiments.bars import question_figure, write_figures
from hft_trl.experiments.paired_tests import compare, markdown, tables
from hft_trl.experiments.questions import BASE, QUESTIONS, RUNS, Question, needed
from hft_trl.experiments.trials import make_and_score, read_scores, run_trials
from hft_trl.selection import Selection

ROOT = Path(__file__).parents[2]
QUICK = [
    "--sft.max_steps",
    "2",
    "--dpo.max_steps",
    "1",
    "--sft.split",
    "train[:64]",
    "--dpo.split",
    "train_prefs[:32]",
]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
def test_every_run_of_a_question_exists_and_is_made_after_its_start(question):
    assert question.against in question.runs
    order = [run.name for run in needed((question,))]
    assert set(question.runs.values()) <= set(order)
    for name in order:
        start = RUNS[name].start
        assert start in ("", BASE) or order.index(start) < order.index(name)


def test_the_questions_are_those_of_the_paper():
    ratio, dpo = (next(q for q in QUESTIONS if q.name == name) for name in ("ratio", "dpo"))
    assert [float(label.split()[0]) for label in ratio.runs] == [tenth / 10 for tenth in range(1, 11)]
    combinations = [
        (RUNS[RUNS[run].start].hft.get("method", "hft"), RUNS[run].hft["method"]) for run in dpo.runs.values()
    ]
    assert sorted(combinations) == [("fft", "fft"), ("fft", "hft"), ("hft", "fft"), ("hft", "hft")]
    assert set(RUNS) == {run.name for run in needed(QUESTIONS)}


@pytest.fixture
def scored(monkeypatch):
    """
    Instead of the probes.

    What a model is, so that models can be told apart. Raises at the call that is asked for.
    """
    calls = {"until": 99, "models": []}

    def evaluate(model, tokenizer):
        if len(calls["models"]) == calls["until"]:
            raise KeyboardInterrupt
        calls["models"].append(model.config._name_or_path)
        total = float(sum(p.detach().double().abs().sum() for p in model.parameters()))
        return dict.fromkeys(("knowledge", "ability", "concise"), total)

    monkeypatch.setattr(probes, "evaluate", evaluate)
    return calls


FAMILY = [RUNS[name] for name in ("sft-hft", "dpo-hft-from-hft", "dpo-same", "dpo-complement")]


def test_an_interrupted_family_goes_on_and_ends_in_the_same_scores(scored, tmp_path):
    for name in ("through", "stopped"):
        (tmp_path / name / "scores").mkdir(parents=True)
    make_and_score(FAMILY, 1, tmp_path / "through", QUICK)
    scored.update(until=6, models=scored["models"])  # two models of the second time
    with pytest.raises(KeyboardInterrupt):
        make_and_score(FAMILY, 1, tmp_path / "stopped", QUICK)
    assert set(read_scores(tmp_path / "stopped")) == {"sft-hft", "dpo-hft-from-hft"}
    scored["until"] = 99
    make_and_score(FAMILY, 1, tmp_path / "stopped", QUICK)
    assert len(scored["models"]) == 8  # none was asked twice
    assert read_scores(tmp_path / "stopped") == read_scores(tmp_path / "through")
    assert not any((tmp_path / "stopped" / "models").iterdir())


def test_each_run_makes_the_model_that_it_names(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(trials.shutil, "rmtree", lambda *_, **__: None)  # the models stay
    (tmp_path / "scores").mkdir()
    tuned = [RUNS[name] for name in ("sft-fft", "reset-layer", "blend")]
    make_and_score(tuned, 3, tmp_path, QUICK)
    make_and_score(FAMILY, 3, tmp_path, QUICK)
    base = load_file(demo.MODEL / "model.safetensors")
    fft, reset, blend = (load_file(tmp_path / f"models/{place}/model.safetensors") for place in ("sft-fft-3/sft", "reset-layer-3/half-reset", "blend-3/blend"))  # fmt: skip
    assert all(not torch.equal(fft[name], base[name]) for name in base)
    back = {name for name in base if torch.equal(reset[name], base[name])}
    assert {int(name.split(".")[2]) for name in back} < set(range(8))
    assert len({int(name.split(".")[2]) for name in back}) == 4
    torch.testing.assert_close(blend["lm_head.weight"], (base["lm_head.weight"] + fft["lm_head.weight"]) / 2)
    first = Selection.load(tmp_path / "models/sft-hft-3/sft")
    halves = {name: Selection.load(tmp_path / f"models/{name}-3/dpo") for name in ("dpo-same", "dpo-complement")}
    assert halves["dpo-same"].trainable == first.trainable
    layers = {name for name in first.trainable if ".layers." in name}
    assert not layers & set(halves["dpo-complement"].trainable)


@pytest.mark.parametrize(
    "flag",
    ["--method", "--sft.method", "--model", "--model.dtype=x", "--hft.ratio", "--dpo.seed", "--overwrite", "--config"],
)
def test_what_the_runs_differ_in_can_not_be_set_for_all_of_them(tmp_path, flag):
    """A row must be what its label says."""
    value = {"--method": "fft", "--hft.ratio": "0.3", "--model": "demo", "--config": str(demo.RECIPE)}.get(flag)
    with pytest.raises(HFTError, match="is what the runs differ in"):
        next(run_trials([RUNS[BASE]], 1, 1, tmp_path / "new", 1, [flag] + [value] * (value is not None)))
    assert not (tmp_path / "new").exists()


def test_sigterm_ends_it_and_its_processes_soon(tmp_path):
    command = [sys.executable, "recipes/reproduce.py", "--seeds", "1", "--questions", "sft", "--workers", "2"]
    command += ["--output_dir", str(tmp_path), "--sft.max_steps", "100000", "--sft.save_steps", "2"]
    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)
    while len(list((tmp_path / "models").glob("*/sft/checkpoint-*"))) < 1:
        assert run.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.2)
    run.terminate()
    assert run.wait(timeout=PATIENCE) == 143
    deadline = time.monotonic() + PATIENCE
    while subprocess.run(["pgrep", "-g", str(run.pid)], capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline, "a process lives on"
        time.sleep(0.2)


def test_runs_of_a_question_are_compared_on_the_seeds_that_all_of_them_have():
    question = Question("q", "Which?", {"a": "run0", "b": "run1"}, "a", ("knowledge",))
    means, _ = tables(question, scores_of([1.0, 2.0, 90.0], [3.0, 5.0]))
    assert means.rows == [["a", "2", "1.5 (0.7)"], ["b", "2", "4.0 (1.4)"]]


def test_scores_of_other_flags_are_not_mixed_and_bad_flags_are_found_first(tmp_path):
    with pytest.raises(HFTError, match=r"sft\.max_step"):
        next(run_trials([RUNS[BASE]], 1, 1, tmp_path / "new", 1, ["--sft.max_step", "2"]))
    assert not (tmp_path / "new").exists()
    next(run_trials([RUNS[BASE]], 1, 1, tmp_path, 1, ["--sft.max_steps", "2"]))
    with pytest.raises(HFTError, match=r"made with the flags --sft\.max_steps 2, now they are none"):
        next(run_trials([RUNS[BASE]], 1, 1, tmp_path, 1))


def test_the_recipe_makes_scores_tables_and_pictures_and_a_rerun_makes_nothing_again(tmp_path):
    command = [sys.executable, "recipes/reproduce.py", "--seeds", "1", "--questions", "sft", "--workers", "1", *QUICK]
    command += ["--output_dir", str(tmp_path)]
    times = []
    for _ in range(2):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "3/3" in result.stdout
        times.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "scores").iterdir()})
    assert times[0] == times[1]
    assert sorted(times[0]) == ["base-1.json", "sft-fft-1.json", "sft-hft-1.json"]
    assert json.loads((tmp_path / "scores" / "base-1.json").read_text())["scores"]["knowledge"] == 100.0
    assert "| HFT | 1 |" in (tmp_path / "results.md").read_text()
    assert "also those of earlier calls: 1 at most" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "sft.png").stat().st_size > 5000


def test_seeds_of_earlier_calls_are_counted_where_the_command_names_fewer(tmp_path, monkeypatch):
    recipe = runpy.run_path(str(ROOT / "recipes" / "reproduce.py"))
    monkeypatch.setattr(sys, "argv", ["recipes/reproduce.py", "--seeds", "1"])
    monkeypatch.setitem(recipe["main"].__globals__, "run_trials", lambda *_: iter(()))
    (tmp_path / "scores").mkdir()
    for run in needed([question for question in QUESTIONS if question.name == "sft"]):
        for seed in range(1, 2 if run.name == BASE else 4):
            content = {"run": run.name, "seed": seed, "scores": {"knowledge": 90.0 + seed, "ability": 70.0}}
            (tmp_path / "scores" / f"{run.name}-{seed}.json").write_text(json.dumps(content))
    recipe["main"](*recipe["parse"](["--seeds", "1", "--questions", "sft", "--output_dir", str(tmp_path)]))
    text = (tmp_path / "results.md").read_text()
    assert "| HFT | 3 |" in text
    assert "also those of earlier calls: 3 at most" in text


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["--questions", "sftt"],
            "choose from dpo, embeddings, importance, quantization, ratio, reselect, reset, sft, strategy, or all",
        ),
        (["--seeds", "0"], "--seeds and --sweep_seeds must be at least 1"),
        (["--workers", "-1"], "--workers -1: it must be at least 1"),
    ],
)
def test_options_that_can_not_be_are_refused(words, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "recipes" / "reproduce.py"))["parse"](words)
    assert complaint in capsys.readouterr().err


def scores_of(*rows: list[float]) -> dict:
    return {f"run{n}": {seed: {"knowledge": value} for seed, value in enumerate(row)} for n, row in enumerate(rows)}


percent = st.integers(0, 1000).map(lambda tenths: tenths / 10)
percents = st.lists(st.tuples(percent, percent), min_size=2, max_size=10)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first import of scipy
@given(percents)
def test_a_difference_is_taken_seed_by_seed(pairs):
    scores = scores_of([a for a, _ in pairs], [b for _, b in pairs])
    ours, theirs = compare(scores, "run0", "run1", "knowledge"), compare(scores, "run1", "run0", "knowledge")
    assert ours.seeds == len(pairs)
    assert ours.mean == pytest.approx(fmean(a - b for a, b in pairs), abs=1e-9)
    assert theirs.mean == pytest.approx(-ours.mean, abs=1e-9)
    assert ours.ahead == sum(a - b > 0 for a, b in pairs)
    assert ours.low <= ours.mean + 1e-9
    assert ours.mean <= ours.high + 1e-9


def test_the_test_is_the_paired_t_test():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t = 2 sqrt(3) with two degrees of freedom."""
    found = compare(scores_of([11, 22, 33], [10, 20, 30]), "run0", "run1", "knowledge")
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_seeds_that_only_one_run_has_do_not_count_and_one_seed_has_no_test():
    scores = scores_of([50.0, 60.0], [40.0])
    found = compare(scores, "run0", "run1", "knowledge")
    assert (found.seeds, found.mean, found.ahead) == (1, 10.0, 1)
    assert math.isnan(found.p)
    assert compare(scores, "run0", "run7", "knowledge") is None


def test_tables_pictures_and_the_page_hold_every_run(tmp_path):
    question = Question("q", "Which?", {"a": "run0", "b": "run1", "c": "run2"}, "a", ("knowledge",))
    scores = scores_of([1.0, 2.0], [3.0, 5.0])
    means, differences = tables(question, scores)
    assert means.rows == [["a", "2", "1.5 (0.7)"], ["b", "2", "4.0 (1.4)"], ["c", "-", "-"]]
    assert [row[:3] for row in differences.rows] == [["b", "knowledge", "+2.5"]]
    axes = question_figure(question, scores).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    assert write_figures([question], scores, tmp_path) == [tmp_path / "q.png"]
    assert write_figures([question], {}, tmp_path) == []
    assert "| **b**" not in markdown([question], scores)
    assert "| b | 2 | 4.0 (1.4) |" in markdown([question], scores)
