"""benchmarks/step.py: what it prints is whole, its variants take the same steps, and its bytes are those of HFT."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ["--hidden", "64", "--intermediate", "128", "--layers", "2", "--heads", "1", "--batch", "2", "--length", "16"]


def run(*words):
    command = [sys.executable, "benchmarks/step.py", "--json", "--rounds", "2", *TINY, *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)  # stdout holds nothing else


@pytest.fixture(scope="module")
def printed():
    return run()


@pytest.fixture(scope="module")
def rows(printed):
    return {(row["stage"], row["checkpointing"], row["variant"]): row for row in printed["records"]}


@pytest.fixture(scope="module")
def by_ratio():
    return {(row["variant"], row["ratio"]): row for row in run("--ratios", "0.25,1.0", "--blocks")["records"]}


def test_every_variant_of_every_stage_has_every_figure(rows):
    assert len(rows) == 2 * 2 * 4
    for (_, _, variant), row in rows.items():
        assert row["measured"] == "interleaved"
        assert len(row["steps"]) == 2
        for part in ("forward", "backward", "optimizer", "total"):
            assert 0 < row["seconds"][part]["low"] <= row["seconds"][part]["median"] <= row["seconds"][part]["high"]
        for step in row["steps"]:
            assert math.isclose(step["total"], step["forward"] + step["backward"] + step["optimizer"])
        for name in ("weight", "trained", "saved", "gradient", "optimizer", "peak"):
            assert row["bytes"][name] > 0, name
        assert set(row["time_to"]) == {"fft", "fft_with_checkpointing", "stock"}
        assert None not in row["time_to"].values()
        if variant == "fft":
            assert row["time_to"]["fft"] == {"low": 1.0, "median": 1.0, "high": 1.0}


def test_the_machine_and_the_settings_are_named(printed):
    assert printed["machine"]
    assert printed["threads"] > 0
    assert printed["environment"]["torch"]
    assert printed["options"]["hidden"] == 64
    assert printed["date"].startswith("20")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
class TestOneStage:
    def test_our_trainer_and_trls_with_the_same_mask_have_the_same_losses(self, rows, stage, checkpointing):
        ours, stock, full = (rows[stage, checkpointing, name]["losses"] for name in ("hft", "stock", "fft"))
        assert ours == stock
        assert len(set(ours)) > 1
        assert ours[0] == full[0]  # the same start weights and tokens
        assert ours != full

    def test_gradients_and_optimizer_state_are_those_of_what_learns(self, rows, stage, checkpointing):
        for variant in ("fft", "hft", "stock", "lora"):
            sizes = rows[stage, checkpointing, variant]["bytes"]
            assert sizes["gradient"] == sizes["trained"]
            # two moments of every trained tensor, and a float32 that counts its steps
            assert sizes["optimizer"] == 2 * sizes["trained"] + 4 * sizes["trained_tensors"]

    def test_hft_needs_less_than_fft(self, rows, stage, checkpointing):
        ours, stock, full = (rows[stage, checkpointing, name]["bytes"] for name in ("hft", "stock", "fft"))
        assert ours["trained"] == stock["trained"] < full["trained"] == full["weight"] == ours["weight"]
        assert ours["saved"] == stock["saved"] <= full["saved"]
        if stage == "dpo":  # the frozen half is stored once
            assert ours["reference"] == ours["trained"]
            assert stock["reference"] == full["reference"] == full["weight"]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_checkpointing_changes_no_loss_and_saves_less(rows, stage):
    for variant in ("fft", "hft"):
        without, with_it = (rows[stage, word, variant] for word in (False, True))
        assert without["losses"] == with_it["losses"]
        assert with_it["bytes"]["saved"] < without["bytes"]["saved"]


def test_all_of_a_model_takes_what_full_fine_tuning_takes(by_ratio):
    full, all_of_it, quarter = by_ratio["fft", 0.5], by_ratio["hft", 1.0], by_ratio["hft", 0.25]
    assert all_of_it["losses"] == full["losses"]
    for name in ("weight", "trained", "saved", "gradient", "optimizer"):
        assert all_of_it["bytes"][name] == full["bytes"][name]
    for name in ("trained", "gradient", "optimizer"):
        assert quarter["bytes"][name] < full["bytes"][name]


def test_blocks_give_the_same_losses_as_turns(rows, by_ratio):
    for row in by_ratio.values():
        assert row["measured"] == "blocks"
        assert len(row["steps"]) == 2  # one in each block, and the second block begins with a model of its own
    in_turn = rows["sft", False, "fft"]["losses"]
    assert by_ratio["fft", 0.5]["losses"] == in_turn[: len(in_turn) - 1]
