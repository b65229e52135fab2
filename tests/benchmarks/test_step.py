"""benchmarks/step.py: what it prints is whole, its variants take the same steps, and its bytes are those of HFT."""

import argparse
import json
import math
import runpy
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import PATIENCE
from warm import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import step as benchmark

pytestmark = pytest.mark.long

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


@pytest.mark.parametrize("fits", [True, False])
def test_a_trainer_and_its_model_are_gone_before_the_next_is_built(monkeypatch, tmp_path, fits):
    """Also after one that ran out of memory, and where each is measured in this process, as on a GPU."""
    earlier, make, handler = [], benchmark.Setting.make_trainer, signal.getsignal(signal.SIGTERM)

    def make_trainer(setting, options):
        assert [reference() for reference in earlier] == [None] * len(earlier)
        trainer = make(setting, options)
        earlier.extend([weakref.ref(trainer), weakref.ref(trainer.model)])
        return trainer

    def sizes(_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(benchmark.Setting, "make_trainer", make_trainer)
    if not fits:
        monkeypatch.setattr(benchmark.Run, "sizes", sizes)
    options = benchmark.parse(["--rounds", "2", *TINY])
    options.folder = str(tmp_path)
    settings = [benchmark.Setting(*names, False) for names in (("sft", "hft"), ("sft", "fft"), ("dpo", "hft"))]
    rows = benchmark.take_turns(settings, options, True)
    assert [len(row["steps"]) for row in rows] == [2 if fits else 0] * 3
    assert len(earlier) == 12
    peak, steps = benchmark.alone(settings[0], options, 1)
    assert peak >= 0
    assert len(steps) == 1
    assert signal.getsignal(signal.SIGTERM) == handler


def test_of_the_settings_that_fit_the_fastest_of_each_variant_is_found_and_measured_again(monkeypatch):
    """A setting needs as much as it does not recompute. More rows are faster, and recomputing is slower."""
    tried = []

    def by_itself(setting, options, steps):
        tried.append(setting)
        recomputed = 1 / setting.every_n_layers if setting.checkpointing else 0
        cost = setting.micro_batch * (2 - recomputed) * (0.5 if setting.variant == "hft" else 1)
        seconds = (1 + recomputed / 3) / setting.micro_batch
        return (None if cost > 6 else round(cost * 1e9)), [{"total": seconds}] * steps

    def take_turns(settings, options, blocks):
        assert blocks
        return [
            {"variant": each.variant, "steps": [{"total": 1.0 if each.variant == "hft" else 2.0}] * 2}
            for each in settings
        ]

    monkeypatch.setattr(benchmark, "by_itself", by_itself)
    monkeypatch.setattr(benchmark, "take_turns", take_turns)
    options = benchmark.parse([*TINY, "--batch", "4", "--equal-memory", "4.1", "--stages", "sft", "dpo"])
    records = benchmark.equal_memory(options)
    best = {(row["stage"], row["variant"]): row for row in records if "fastest" in row}
    assert len(best) == 6
    for stage in ("sft", "dpo"):
        full, half = best[stage, "fft"], best[stage, "hft"]
        assert (full["micro_batch"], full["checkpointing"], full["every_n_layers"]) == (4, True, 1)
        assert (half["micro_batch"], half["checkpointing"]) == (4, False)
        assert half["fastest"]["time_to_fft"]["median"] == 0.5
        tokens = 4 * 16 * (1 if stage == "sft" else 2)
        assert half["fastest"]["tokens_per_second"]["median"] == tokens
    assert all(row["peak"] < 4.1e9 for row in records if row["fits"])
    lost = [row for row in records if not row["fits"]]
    assert lost
    assert not any("fastest" in row for row in lost)
    assert benchmark.speed_table(records, 4.1).row_count == len(records) == len(tried)
    assert {each.every_n_layers for each in tried if each.stage == "dpo"} == {1}


def test_rows_are_not_accumulated_where_the_backward_pass_updates():
    options = benchmark.parse([*TINY, "--batch", "6", "--hft", '{"optimizer_in_backward": true}'])
    assert benchmark.micro_batches(options, "fft") == [1, 2, 3, 6]
    assert benchmark.micro_batches(options, "hft") == [6]


def test_a_real_search_measures_every_setting():
    common = ["--stages", "sft", "--variants", "fft", "hft", "--equal-memory"]
    records = run(*common, "4")["records"]
    assert len(records) == 2 * 3 * 2
    assert all(row["fits"] and row["peak"] >= 0 and row["tokens_per_second"]["low"] > 0 for row in records)
    best = {row["variant"]: row["fastest"] for row in records if "fastest" in row}
    assert best["fft"]["time_to_fft"]["median"] == 1.0
    assert best["hft"]["time_to_fft"]["median"] > 0


def test_micro_batches_take_the_step_of_the_whole_batch(tmp_path):
    """Selective checkpointing too. The losses of the micro-batches add up to the batch's."""
    options = benchmark.parse(TINY)
    options.folder = str(tmp_path)
    whole = benchmark.Run(benchmark.Setting("sft", "hft", False), options)
    parts = benchmark.Run(benchmark.Setting("sft", "hft", True, micro_batch=1, every_n_layers=2), options)
    for run_ in (whole, parts):
        run_.step()
    assert len(parts.losses) == 2 * len(whole.losses)
    losses = [float(a + b) for a, b in zip(parts.losses[::2], parts.losses[1::2], strict=True)]
    assert losses == pytest.approx([float(loss) for loss in whole.losses], rel=1e-4)


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
        (["--equal-memory", "0"], "--equal-memory 0: it must be above 0"),
        (["--equal-memory", "8", "--blocks"], "--blocks and --equal-memory: drop one of them"),
        (["--equal-memory", "8", "--ratios", "0.5"], "--ratios and --equal-memory: drop one of them"),
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
