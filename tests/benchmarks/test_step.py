"""benchmarks/step.py: what it prints is whole, its variants take the same steps, and its bytes are those of HFT."""

import argparse
import json
import math
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import PATIENCE
from warm import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import step as benchmark

TINY = ["--hidden", "64", "--intermediate", "128", "--layers", "2", "--heads", "1", "--batch", "2", "--length", "16"]


def run(*words):
    command = [sys.executable, "benchmarks/step.py", "--json", "--rounds", "2", *TINY, *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
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


def test_what_does_not_fit_beside_the_others_runs_alone_and_what_never_fits_has_no_time(monkeypatch):
    alive = []

    class OnASmallMachine:
        """Takes the memory of one model, or of none for full fine-tuning, in the place of a real run."""

        def __init__(self, setting, options):
            if alive or setting.variant == "fft":
                raise torch.OutOfMemoryError
            alive.append(setting)
            self.steps, self.losses = [], [torch.tensor(1.0)]

        def step(self):
            self.steps.append(dict.fromkeys(benchmark.PARTS, 2.0))

        def sizes(self):
            alive.clear()  # the last that is asked of a run
            return {"weight": 1}

    monkeypatch.setattr(benchmark, "Run", OnASmallMachine)
    settings = [benchmark.Setting("sft", variant, False) for variant in ("hft", "fft", "stock")]
    clear = benchmark.take_turns

    def begin_empty(*arguments):
        alive.clear()
        return clear(*arguments)

    monkeypatch.setattr(benchmark, "take_turns", begin_empty)
    ours, full, stock = benchmark.measure(settings, argparse.Namespace(rounds=4, blocks=False))
    assert {row["measured"] for row in (ours, full, stock)} == {"blocks"}
    assert [len(row["steps"]) for row in (ours, full, stock)] == [4, 0, 4]
    assert full["seconds"]["total"] is None
    assert ours["time_to"]["fft"] is None
    assert ours["time_to"]["stock"]["median"] == 1.0
    for row in (ours, full, stock):
        row["bytes"]["peak"] = None
    assert [table.row_count for table in benchmark.tables([ours, full, stock])] == [3, 3]


def test_more_settings_of_hft_and_another_optimizer_reach_the_trainer():
    """Gradients are gone after a backward pass that updates; packed matrices are smaller, and so are 8-bit states."""
    common = ["--stages", "sft", "--variants", "fft", "hft", "--checkpointing", "off", "--optim", "adamw_bnb_8bit"]
    hft = {"frozen_quantization": "int8", "optimizer_in_backward": True}
    full, half = run(*common, "--hft", json.dumps(hft))["records"]
    assert half["bytes"]["gradient"] == 0 < full["bytes"]["gradient"]
    assert half["bytes"]["weight"] < full["bytes"]["weight"]
    assert full["bytes"]["optimizer"] < 8 * full["bytes"]["trained"] / 4
    assert all(math.isfinite(loss) for loss in half["losses"])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--hft", '{"ratioo": 1}'], "are no settings of HFT beside its ratio: "),
        (["--hft", '{"ratio": 1}'], "are no settings of HFT beside its ratio: "),
        (["--hft", '{"frozen_dtype": "int3"}'], "frozen_dtype is 'int3'"),
        (["--hft", "[1]"], "are no settings of HFT"),
        (["--hft", "{"], "are no settings of HFT"),
        (["--ratios", "0.5,0"], "--ratios 0: each must be in (0, 1]"),
        (["--ratios", "half"], "invalid numbers value: 'half'"),
        (["--ratios", "0.5", "--stages", "dpo"], "--stages and --ratios: drop one of them"),
        (["--checkpointing", "off", "--ratios", "0.5"], "--checkpointing and --ratios: drop one of them"),
        (["--rounds", "1"], "--rounds: give at least 2"),
    ],
)
def test_flags_that_can_not_be_are_refused(flags, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.parse(flags)
    assert complaint in capsys.readouterr().err


def test_what_is_measured_is_all_unless_the_flags_say_less():
    columns = ("stages", "variants", "checkpointing")
    found = [[set(vars(benchmark.parse(words))[name]) for name in columns] for words in ([], ["--ratios", "0.5"])]
    assert found[0] == [{"sft", "dpo"}, {"fft", "hft", "stock", "lora"}, {"off", "on"}]
    assert found[1] == [{"sft"}, {"fft", "hft"}, {"off"}]
    assert benchmark.parse(["--stages", "dpo"]).stages == ["dpo"]


@pytest.mark.parametrize(
    ("script", "flags", "complaint"),
    [
        ("selection", ["--repeat", "0"], "--repeat 0: it must be at least 1"),
        ("memory", ["--hidden", "32"], "--hidden 32: it must be a multiple of 64"),
        ("memory", ["--layers", "0"], "--layers 0: it must be at least 1"),
        ("traffic", ["--steps", "0"], "--steps 0: it must be at least 1"),
    ],
)
def test_flags_of_the_other_benchmarks_that_can_not_be_are_refused(script, flags, complaint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"))["main"]()
    assert complaint in capsys.readouterr().err
