"""The recipe under ZeRO-2 and ZeRO-3 in two real processes, against one process without DeepSpeed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import PATIENCE
from launching import ROOT, launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hft_trl import demo

pytestmark = pytest.mark.deepspeed

# Frozen embeddings: the hardest case for reentrant checkpointing
RECIPE = [
    *("recipes/sft_then_dpo.py", "--hft.train_embeddings", "false"),
    *("--sft.split", "train[:64]", "--sft.max_steps", "4", "--sft.save_steps", "2", "--sft.logging_steps", "1"),
    *("--dpo.split", "train_prefs[:64]", "--dpo.max_steps", "4", "--dpo.save_steps", "2", "--dpo.logging_steps", "1"),
]
# The same global batch of 8, by other settings in either stage
TWO = [
    *("--sft.per_device_train_batch_size", "4", "--sft.gradient_checkpointing", "true"),
    *("--dpo.per_device_train_batch_size", "2", "--dpo.gradient_accumulation_steps", "2"),
    *("--dpo.gradient_checkpointing", "true"),
]
ONE = ["--sft.per_device_train_batch_size", "8", "--dpo.per_device_train_batch_size", "8"]
STAGES = ("sft", "dpo")


class Run(NamedTuple):
    folder: Path
    killed: Path
    facts: dict[tuple[str, int], dict]
    output: str
    zero_stage: int

    def report(self) -> dict:
        return json.loads((self.folder / "report.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process, without DeepSpeed and without gradient checkpointing."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, *RECIPE, *ONE, "--output_dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=PATIENCE)
    return folder


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def run(request, tmp_path_factory) -> Run:
    """A run in one go, and one that was killed in each stage after its first checkpoint and then went on."""
    zero_stage = request.param
    base = tmp_path_factory.mktemp(f"zero{zero_stage}")
    (base / "watch").mkdir()
    command = ("watched.py", *RECIPE, *TWO, "--output_dir")
    result = launch(zero_stage, *command, base / "run", WATCH=base / "watch")
    facts = {(stage, rank): json.loads((base / "watch" / f"{stage}-{rank}.json").read_text())
             for stage in STAGES for rank in range(2)}  # fmt: skip
    for stage in STAGES:
        stopped = launch(zero_stage, *command, base / "killed", WATCH=base, KILL_AT=f"{stage}:3", check=False)
        assert stopped.returncode != 0
        assert not (base / "killed" / stage / "model.safetensors").exists()
    launch(zero_stage, *command, base / "killed", WATCH=base)
    return Run(base / "run", base / "killed", facts, result.stdout + result.stderr, zero_stage)


def test_two_processes_run_under_the_stage_that_was_asked_for(run):
    assert {fact["num_processes"] for fact in run.facts.values()} == {2}
    assert {fact["zero_stage"] for fact in run.facts.values()} == {run.zero_stage}
    assert run.report()["num_processes"] == 2


@pytest.mark.parametrize("stage", STAGES)
def test_the_selection_is_that_of_one_process_on_every_rank(run, alone, stage):
    ours, theirs = (json.loads((folder / stage / "hft_selection.json").read_text()) for folder in (run.folder, alone))
    assert {run.facts[stage, rank]["digest"] for rank in range(2)} == {theirs["digest"]}
    assert ours["trainable"] == theirs["trainable"]
    if stage == "sft":  # that of DPO starts from weights that are rounded in another order
        assert ours["start_model"] == theirs["start_model"]


@pytest.mark.parametrize("stage", STAGES)
def test_only_trainable_parameters_have_reduced_gradients_and_optimizer_state(run, stage):
    """How much state there is in all, the test of the report says."""
    selection = json.loads((run.folder / stage / "hft_selection.json").read_text())
    frozen_outside = {"model.embed_tokens.weight"}
    assert frozen_outside <= set(selection["frozen"])
    for rank in range(2):
        assert run.facts[stage, rank]["reduced"] == sorted(selection["trainable"])
        assert run.facts[stage, rank]["optimized"] == sorted(selection["trainable"])


def test_losses_are_those_of_one_process(run, alone):
    """Also with gradient checkpointing here and without it there."""
    theirs = json.loads((alone / "report.json").read_text())
    for ours, stage in zip(run.report()["stages"], theirs["stages"], strict=True):
        losses, expected = ([row["loss"] for row in record["history"] if "loss" in row] for record in (ours, stage))
        assert len(losses) == 4
        assert losses == pytest.approx(expected, rel=1e-5)


def test_final_weights_are_those_of_one_process(run, alone):
    for stage in STAGES:
        ours, theirs = (load_file(folder / stage / "model.safetensors") for folder in (run.folder, alone))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


def test_the_frozen_half_has_the_bytes_of_the_start_file(run):
    for stage, start in (("sft", demo.MODEL), ("dpo", run.folder / "sft")):
        before, after = load_file(start / "model.safetensors"), load_file(run.folder / stage / "model.safetensors")
        selection = json.loads((run.folder / stage / "hft_selection.json").read_text())
        assert selection["frozen"]
        for name in selection["frozen"]:
            assert before[name].numpy().tobytes() == after[name].numpy().tobytes(), name
        assert all(not torch.equal(before[name], after[name]) for name in selection["trainable"])


def test_the_final_folder_holds_a_full_model(run):
    model, loading = AutoModelForCausalLM.from_pretrained(run.folder / "dpo", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    saved = load_file(run.folder / "dpo" / "model.safetensors")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())


def test_a_killed_run_goes_on_to_the_same_bytes(run):
    for stage in STAGES:
        ours, theirs = ((folder / stage / "model.safetensors").read_bytes() for folder in (run.killed, run.folder))
        assert ours == theirs
    resumed = [
        record["resumed_from_step"] for record in json.loads((run.killed / "report.json").read_text())["stages"]
    ]
    assert resumed == [2, 2]


def test_another_number_of_processes_or_backend_is_refused_before_a_step(run, tmp_path):
    """DeepSpeed's partitions fit one number of processes, and nothing else reads them."""
    shutil.copytree(run.folder / "sft", tmp_path / "run" / "sft")
    (tmp_path / "run" / "sft" / "model.safetensors").unlink()  # as if it had been killed when it saved it
    stage = tmp_path / "run" / "sft" / "stage.json"
    stage.write_text(json.dumps({**json.loads(stage.read_text()), "record": None}))
    command = (*RECIPE, *ONE, "--sft.gradient_checkpointing", "true", "--dpo.gradient_checkpointing", "true")
    command = (*command, "--output_dir", tmp_path / "run")
    one = launch(run.zero_stage, "watched.py", *command, num_processes=1, WATCH=tmp_path, check=False)
    assert one.returncode != 0
    assert f"was saved by 2 processes, and DeepSpeed ZeRO-{run.zero_stage} cannot divide it into 1" in one.stderr
    plain = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert plain.returncode == 2
    assert f"was saved by DeepSpeed ZeRO-{run.zero_stage}, whose files one process or DDP cannot read" in plain.stderr
    assert (tmp_path / "run" / "sft" / "checkpoint-4" / "hft_checkpoint.json").is_file()


def test_the_report_counts_as_one_process_does(run, alone):
    theirs = json.loads((alone / "report.json").read_text())["stages"]
    for ours, expected in zip(run.report()["stages"], theirs, strict=True):
        for key in ("trainable_params", "total_params", "share", "rows", "steps", "tokens", "frozen_unchanged"):
            assert ours[key] == expected[key], key
        # Two moments of 4 bytes per trained parameter, and a little for padding and step counters
        assert ours["optimizer_state_bytes"] == pytest.approx(8 * ours["trainable_params"], rel=1e-3)
        assert [unit["name"] for unit in ours["moved"]] == [unit["name"] for unit in expected["moved"]]
        assert all((unit["relative_change_from_start"] > 0) == unit["trainable"] for unit in ours["moved"])


def test_checkpointing_is_reentrant_where_frozen_parameters_need_it(run):
    expected = {"use_reentrant": True} if run.zero_stage == 3 else None
    assert all(fact["checkpointing"] == expected for fact in run.facts.values())


def test_who_holds_how_much_of_policy_and_reference(run):
    """Under ZeRO-3 two processes hold half each, of the reference too; under ZeRO-2 each holds all."""
    for fact in run.facts.values():
        for model in filter(None, (fact["policy"], fact["reference"])):
            own, whole = model
            assert whole == 886368
            assert own == (whole / 2 if run.zero_stage == 3 else whole)
    assert all(run.facts["dpo", rank]["reference"] for rank in range(2))
