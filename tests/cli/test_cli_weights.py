"""`hft-trl half-reset`, `repair` and `diff` on models that the recipe trained: what they print, write and exit with."""

import contextlib
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import PATIENCE, tiny_llama
from safetensors.torch import load_file
from typer.testing import CliRunner

from hft_trl import HFTConfig, demo
from hft_trl.cli import app
from hft_trl.selection import Selection

ROOT = Path(__file__).parents[2]
YES = "frozen half byte-identical"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The embedded model after four steps of SFT with each method: `hft` and `fft`."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("hft", "fft"):
        flags = ["--max_steps", "4", "--per_device_train_batch_size", "4", "--output_dir", str(folder / method)]
        command = [
            "recipes/sft.py",
            "--model_name_or_path",
            "demo",
            "--dataset_name",
            "demo",
            "--method",
            method,
            *flags,
        ]
        found = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert found.returncode == 0, found.stderr[-3000:]
    return folder


def test_diff_of_an_hft_model_says_byte_identical_and_exits_with_0(runs):
    result = run("diff", "demo", runs / "hft")
    assert result.exit_code == 0, result.output
    assert YES in result.stdout
    assert "feed forward" in result.stdout
    assert "lm_head" in result.stdout


def test_half_reset_then_diff(runs, tmp_path):
    """What was set back is the base's, standard output is JSON alone, and `select` shows the stored half."""
    result = run("half-reset", "--base", "demo", "--tuned", runs / "fft", "--out", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert "50.00%" in result.stdout
    result = run("diff", "demo", tmp_path / "r", "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["models"]
    assert (row["frozen_half_byte_identical"], row["base_is_start_model"]) == (True, True)
    assert row["selection"] == Selection.load(tmp_path / "r").digest
    shown = json.loads(run("select", tmp_path / "r", "--json").stdout)
    assert (shown["stored"], shown["digest"]) == (True, row["selection"])


def test_exit_code_1_when_the_frozen_half_is_not_the_bases(runs):
    """Here, since another model is given as the base; the JSON says the same."""
    result = run("diff", runs / "fft", runs / "hft")
    assert result.exit_code == 1
    assert YES not in result.stdout
    assert "is not the model that its last stage started from" in result.stdout
    result = run("diff", runs / "fft", runs / "hft", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["models"][0]["frozen_half_byte_identical"] is False


def test_fft_beside_hft_in_one_picture(runs, tmp_path):
    result = run("diff", "demo", runs / "fft", runs / "hft", "--plot", tmp_path / "d.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "d.png").stat().st_size > 10_000
    assert "everything learned (FFT)" in result.stdout
    assert YES in result.stdout
    assert "--plot is ''" in run("diff", "demo", runs / "fft", "--plot", "").stderr


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        (["--ratio", "0.3"], {"ratio": 0.3}),
        (["--strategy", "layer", "--seed", "7"], {"strategy": "layer", "seed": 7}),
        (["--no-train-embeddings", "--exclude", "o_proj"], {"train_embeddings": False, "exclude": ["o_proj"]}),
        (["--no-train-lm-head", "--no-train-final-norm"], {"train_lm_head": False, "train_final_norm": False}),
    ],
)
def test_flags_are_the_settings(runs, tmp_path, flags, setting):
    """Each flag sets the field of its name: which tensors are whose is what `select` draws."""
    assert run("half-reset", "--base", "demo", "--tuned", runs / "fft", "--out", tmp_path / "r", *flags).exit_code == 0
    assert Selection.load(tmp_path / "r").config == HFTConfig(**setting)
    base, tuned, out = (
        load_file(folder / "model.safetensors") for folder in (demo.MODEL, runs / "fft", tmp_path / "r")
    )
    stays = set(Selection.load(tmp_path / "r").trainable)
    assert all(out[name].equal((tuned if name in stays else base)[name]) for name in out)


def test_repair_writes_the_average_of_a_weight(runs, tmp_path):
    result = run("repair", "demo", runs / "fft", "--out", tmp_path / "b", "--weight", "0")
    assert result.exit_code == 0, result.output
    assert "1 times demo plus 0 times" in result.stdout
    base, out = load_file(demo.MODEL / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert all(out[name].equal(base[name]) for name in base)
    assert "no hft_selection.json" in run("diff", "demo", tmp_path / "b").stdout


def test_repair_shows_what_it_measured_and_writes_what_it_chose(runs, tmp_path):
    """The embedded world has rows of its own; standard output is one JSON object, or the table."""
    flags = ("--max-rows", "4", "--weights", "0.5", "--tolerance", "9")
    result = run("repair", "demo", runs / "fft", *flags, "--out", tmp_path / "a", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record == json.loads((tmp_path / "a" / "repair.json").read_text())
    (tmp_path / "texts.txt").write_text("A text of any kind. " * 20)
    flags = ("--max-rows", "4", "--texts", tmp_path / "texts.txt", "--ratio", "0.3")
    result = run("repair", "demo", runs / "fft", *flags, "--out", tmp_path / "b")
    assert result.exit_code == 0, result.output
    for name in ("base", "average 0.1", "average 0.5", "average 0.9", "tuned", "half-reset 0.3", "general text"):
        assert name in result.stdout
    chosen = json.loads((tmp_path / "b" / "repair.json").read_text())["chosen"]
    assert [line.split("  ")[0].strip() for line in result.stdout.splitlines() if line.endswith(" yes ")] == [chosen]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--weight", "2"], "weight is 2.0"),
        (["--weight", "0.5", "--texts", "t.txt", "--seed", "0"], "drop --texts and --seed."),
        (["--weight", "0.5", "--tolerance", "0.02", "--json"], "drop --tolerance and --json."),
        (["--weights", "nan"], "weight is nan"),
        (["--texts", "./nowhere"], "nowhere"),
        (["--task", "./nowhere.jsonl"], "nowhere.jsonl"),
        (["--ratio", "0"], "hft.ratio"),
    ],
)
def test_a_mistake_in_repair_is_one_line_and_exit_code_2(runs, tmp_path, flags, words):
    result = run("repair", "demo", runs / "fft", "--out", tmp_path / "r", *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert words in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ratio", "0"], "hft.ratio"),
        (["--tuned", "./nowhere"], "nowhere"),
        (["--base", "./nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(runs, tmp_path, flags, words):
    result = run("half-reset", "--base", "demo", "--tuned", runs / "fft", "--out", tmp_path / "r", *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert not list(tmp_path.iterdir())


def test_diff_of_what_is_no_pair_is_one_line_and_exit_code_2(tmp_path):
    """Not 1, which says that the frozen half moved."""
    tiny_llama(64).save_pretrained(tmp_path)
    result = run("diff", "demo", tmp_path, "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "vocabulary" in result.stderr


def test_select_knows_the_embedded_model_by_its_word():
    result = run("select", "demo", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == "demo"


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_progress_is_shown_on_standard_error_where_that_is_a_terminal(runs, tmp_path):
    """And standard output holds the result alone."""
    controller, terminal = pty.openpty()
    # A new one is 0 characters wide, and tqdm draws nothing there.
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = ["half-reset", "--base", "demo", "--tuned", str(runs / "fft"), "--out", str(tmp_path / "r")]
    found = subprocess.run(
        [sys.executable, "-c", "from hft_trl.cli import main; main()", *command],
        stdout=subprocess.PIPE,
        stderr=terminal,
        timeout=PATIENCE,
        check=True,
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that nothing is left to read
        while piece := os.read(controller, 1 << 16):
            shown += piece
    os.close(controller)
    assert b"Writing" in shown
    assert b"100%" in shown
    assert found.stdout.count(b"\n") == 1
