"""Data of any size: read in pieces, prepared once, reused by the next run, and a progress bar for each pass."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, tulu_row, ultrafeedback_row
from datasets import Dataset
from training import sft_trainer
from trl import SFTConfig

from hft_trl import HFTConfig, HFTSFTTrainer, exit_on_user_error
from hft_trl.recipe import parse_stage
from hft_trl.recipe.rows import sft_dataset

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
TRAINERS_PASSES = {"Tokenizing train dataset", "Building labels for train dataset", "Truncating train dataset"}


def environment(folder, **extra):
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache"), **extra}


def run(*command, env):
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.mark.e2e
def test_a_rerun_in_a_new_process_tokenises_nothing_and_the_benchmark_tells(tmp_path):
    """The benchmark's second run passes --overwrite: it trains again, from the first one's tokens."""
    command = [sys.executable, "benchmarks/data.py", "--rows", "50", "--pairs", "0", "--json"]
    content = json.loads(run(*command, "--output_dir", str(tmp_path), env=environment(tmp_path)).stdout)
    assert content["files"]["sft"]["rows"] == 50
    first, again = content["runs"]
    assert first["phases"].keys() >= {"Generating train split", "Checking rows", *TRAINERS_PASSES}
    assert {phase["rows"] for phase in first["phases"].values()} == {50}
    assert again["phases"].keys() == {"Checking rows"}
    for result in (first, again):
        assert result["first_step_seconds"] > 0
        assert 0 < result["own_memory_bytes"] <= result["peak_memory_bytes"] < 4e9
    assert not list(tmp_path.iterdir())


@pytest.mark.e2e
def test_two_processes_prepare_the_data_once_and_a_rerun_not_at_all(tmp_path):
    path = tmp_path / "pairs.jsonl"
    Dataset.from_list([ultrafeedback_row(number) for number in range(40)]).to_json(path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, "recipes/dpo.py",
        "--model_name_or_path", "demo", "--dataset_name", str(path), "--output_dir", str(tmp_path / "out"),
        "--max_steps", "1", "--save_strategy", "no", "--report_to", "none", "--overwrite",
    ]  # fmt: skip
    first = run(*command, env=environment(tmp_path))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["num_processes"] == 2
    assert len(re.findall(r"Checking rows: +0%", first.stderr)) == 1  # a busy bar may say 100% twice
    assert len(re.findall(r"Tokenizing train dataset: +0%", first.stderr)) == 1
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.arrow")}
    assert len(files) >= 3
    again = run(*command, env=environment(tmp_path))
    assert "Tokenizing" not in again.stderr
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.arrow")} == files


GROWTH = """
import re, sys, threading, time
from pathlib import Path
from hft_trl.recipe.loading import load_split
from hft_trl.recipe.rows import sft_dataset

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    global peak
    while True:
        peak = max(peak, own())
        time.sleep(0.01)

sft_dataset(load_split(sys.argv[1]), "small")  # whatever is loaded at the first use
start = peak = own()
threading.Thread(target=watch, daemon=True).start()
checked = sft_dataset(load_split(sys.argv[2]), "large")
peak = max(peak, own())
print(len(checked), peak - start)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_and_checking_hold_no_more_memory_for_more_rows(tmp_path):
    """
    Three times the rows (160 MB more) take less than 60 MB more.

    What is held is a batch, whatever the file's size.
    """
    for rows, name in ((8_000, "small"), (24_000, "large")):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for number in range(rows):
                row = tulu_row(number)
                row["messages"][1]["content"] *= 1000
                file.write(json.dumps(row) + "\n")
    assert (tmp_path / "large.jsonl").stat().st_size > 2e8
    files = [str(tmp_path / f"{name}.jsonl") for name in ("small", "large")]
    rows, growth = run(sys.executable, "-c", GROWTH, *files, env=environment(tmp_path)).stdout.split()
    assert int(rows) == 24_000
    assert int(growth) < 6e7


def test_large_data_are_prepared_by_several_processes_unless_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setattr("hft_trl.recipe.stage.LARGE", 20)
    flags = ["--model_name_or_path", "demo", "--output_dir", str(tmp_path / "out")]
    for rows, given, expected in ((20, [], range(4, 17)), (19, [], [None]), (20, ["--dataset_num_proc", "1"], [1])):
        path = tmp_path / f"{rows}.jsonl"
        Dataset.from_list([tulu_row(number) for number in range(rows)]).to_json(path)
        stage, _ = parse_stage("sft", SFTConfig, [*flags, "--dataset_name", str(path), *given])
        stage.load_data()
        assert stage.args.dataset_num_proc in expected


def test_several_processes_prepare_the_same_rows(base, tulu, tmp_path):
    alone, together = (
        sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(), dataset_num_proc=number) for number in (None, 3)
    )
    assert alone.train_dataset.to_list() == together.train_dataset.to_list()


def test_the_row_check_shows_a_progress_bar_on_the_error_stream(capsys):
    sft_dataset(Dataset.from_list([tulu_row(number) for number in range(2500)]), "chats")
    captured = capsys.readouterr()
    assert "Checking rows: 100%" in captured.err
    assert "2500/2500" in captured.err
    assert captured.out == ""


def test_an_error_begins_on_a_line_of_its_own(capsys):
    """The progress bar is closed before the one-line message is printed."""
    rows = [*(tulu_row(number) for number in range(3)), {**tulu_row(3), "messages": []}]
    with pytest.raises(SystemExit), exit_on_user_error():
        sft_dataset(Dataset.from_list(rows), "chats")
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: row 3 of chats")
