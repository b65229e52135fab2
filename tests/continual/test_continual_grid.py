"""benchmarks/continual.py: every approach with each method, made once, and compared seed by seed."""

import json
import runpy
import sys
from statistics import fmean
from typing import get_args, get_type_hints

import pytest
from warm import ROOT

from hft_trl import HFTError, demo
from hft_trl.continual.continual_arguments import ContinualArguments
from hft_trl.continual.continual_recipe import parse_continual
from hft_trl.experiments.runner import run_points

pytestmark = pytest.mark.long

GRID = runpy.run_path(str(ROOT / "benchmarks" / "continual.py"))


def test_every_approach_of_the_recipe_is_in_it_with_each_method_it_has(tmp_path):
    approaches = set(get_args(get_type_hints(ContinualArguments)["approach"]))
    assert {run.approach for run in GRID["GRID"]} == approaches
    for run in GRID["GRID"]:
        words = GRID["command"](run, 7, tmp_path, [])[2:]
        recipe = parse_continual(words, default_config=demo.CONTINUAL_RECIPE)
        assert (recipe.run.approach, recipe.run.output_dir) == (run.approach, str(tmp_path))
        assert recipe.arguments(tmp_path, 1).seed == 7
        if run.method:
            assert (recipe.hft.method, recipe.hft.seed) == (run.method, 7)


def scores_file(folder, run, seed, op, knowledge):
    folder.mkdir(exist_ok=True, parents=True)
    content = {"op": [1.0, op], "bwt": [0.0, -op], "bwt_t_minus_1": [None, -2 * op], "rounds": [{"name": "round-2"}]}
    approach, _, method = run.partition("-")
    content |= {"approach": approach, "method": method or None, "settings": {"seed": seed}}
    content["probes"] = {} if knowledge is None else {"base": {"knowledge": 99}, "round-2": {"knowledge": knowledge}}
    (folder / f"{run}-{seed}.json").write_text(json.dumps(content))


def test_tables_hold_means_after_the_last_round_and_differences_of_the_seeds_that_both_have(tmp_path):
    for seed, (ours, theirs) in enumerate([(50, 40), (60, 44), (70, 45)], 1):
        scores_file(tmp_path / "scores", "sequential-hft", seed, ours, 80)
        scores_file(tmp_path / "scores", "sequential-fft", seed, theirs, 70)
        scores_file(tmp_path / "scores", "individual-hft", seed, ours, None)
    scores_file(tmp_path / "scores", "sequential-hft", 4, 0, 0)
    scores_file(tmp_path / "scores", "lora", 1, 33, 20)
    scores = GRID["read"](tmp_path, GRID["GRID"])
    means, differences = GRID["grids"](GRID["GRID"], scores)
    rows = {(row[0], row[1]): row[2:] for row in means.rows}
    assert rows["sequential", "FFT"] == ["3", "43.0 (2.6)", "-43.0 (2.6)", "-86.0 (5.3)", "70.0 (0.0)"]
    assert rows["sequential", "HFT"][:2] == ["4", "45.0 (31.1)"]
    assert rows["individual", "HFT"] == ["3", "60.0 (10.0)", "-", "-", "-"]
    assert rows["lora", "-"] == ["1", "33.0", "-33.0", "-66.0", "20.0"]
    (op,) = [row for row in differences.rows if row[1] == "OP"]
    assert op[0] == "sequential"
    assert float(op[2]) == pytest.approx(fmean((10, 16, 25)))
    assert op[-1] == "3 of 3"
    assert len(GRID["figure"](GRID["GRID"], scores).axes) == 3


def test_runs_are_made_once_and_their_models_removed(tmp_path, monkeypatch):
    output = tmp_path / "grid"

    def again(*more):
        words = ["--seeds", "1", "--approaches", "multitask", "--output_dir", str(output), "--sft.max_steps", "1"]
        monkeypatch.setattr(sys, "argv", ["benchmarks/continual.py", *words, *more])
        GRID["main"](*GRID["parse"](sys.argv[1:]))
        return {path: path.stat().st_mtime_ns for path in (output / "scores").iterdir()}

    kept = again()
    assert {path.name for path in kept} == {"multitask-fft-1.json", "multitask-hft-1.json"}
    assert not list((output / "runs").glob("*/"))
    assert "multitask" in (output / "results.md").read_text()
    assert again() == kept
    with pytest.raises(HFTError, match="holds scores made with the flags"):
        again("--eval_batch_size", "3")


@pytest.mark.parametrize(
    "flag", ["--method=fft", "--sft.seed", "--hft.seed", "--approach", "--sft.learning_rate", "--model"]
)
def test_flags_that_would_make_other_runs_than_the_table_says_are_refused(flag, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        GRID["parse"](["--output_dir", str(tmp_path), flag, "1"])
    assert "is what the runs differ in" in capsys.readouterr().err


def test_scores_of_another_run_than_their_name_says_are_refused(tmp_path):
    scores_file(tmp_path / "scores", "sequential-hft", 1, 50, 80)
    (tmp_path / "scores" / "sequential-hft-1.json").rename(tmp_path / "scores" / "sequential-fft-1.json")
    with pytest.raises(HFTError, match=r"sequential-fft-1\.json holds scores of \('sequential', 'hft', 1\)"):
        GRID["read"](tmp_path, GRID["GRID"])


def test_a_run_that_fails_is_named_with_its_log(tmp_path):
    with pytest.raises(HFTError, match=r"ended with 2\. .*multitask-hft-1\.log ends with: error: .*no_such_flag"):
        list(run_points([GRID["point"](GRID["Run"]("multitask", "hft"), 1, tmp_path, ["--no_such_flag"])], tmp_path))


SLOW = """
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path("stopped").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("started").touch()
time.sleep(3600)
pathlib.Path("finished").touch()
"""
FAILS = """
import pathlib, sys, time
while not pathlib.Path("started").exists():
    time.sleep(0.01)
sys.exit(2)
"""


def test_where_one_run_fails_the_others_are_told_to_end_and_none_begins(tmp_path, monkeypatch):
    """They save at a SIGTERM, so nobody waits for all that they have left to do."""
    scripts = {"sequential-fft": SLOW, "sequential-hft": FAILS}

    def command(run, seed, folder, flags):
        return [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n" + scripts[run.name]]

    monkeypatch.setitem(GRID["main"].__globals__, "command", command)
    words = ["--seeds", "3", "--approaches", "sequential", "--workers", "2", "--output_dir", str(tmp_path / "grid")]
    with pytest.raises(HFTError, match=r"ended with 2\. .*sequential-hft-1\.log ends with: nothing"):
        GRID["main"](*GRID["parse"](words))
    assert (tmp_path / "stopped").exists()
    assert not (tmp_path / "finished").exists()
    logs = {path.stem for path in (tmp_path / "grid" / "runs").glob("*.log")}
    assert {"sequential-fft-1", "sequential-hft-1"} <= logs
    assert not any(path.endswith("-3") for path in logs)


@pytest.mark.parametrize("flag", ["--workers", "--seeds"])
def test_numbers_that_can_not_be_are_refused(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        GRID["parse"]([flag, "0"])
    assert f"{flag} 0: it must be at least 1" in capsys.readouterr().err
