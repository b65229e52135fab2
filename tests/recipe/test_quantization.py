"""A reference in 8 or 4 bits, and 8-bit optimizers: the recipes run with them, and say what they take."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, tiny_llama
from test_recipes import recipe  # noqa: F401, a fixture
from training import weights
from trl import DPOConfig

from hft_trl import HFTError
from hft_trl.recipe.loading import check_quantizable
from hft_trl.selection import Selection

pytestmark = pytest.mark.long

DPO = [
    "--dataset_name", "demo", "--dataset_train_split", "train_prefs", "--max_length", "64", "--max_steps", "4",
    "--save_steps", "2", "--logging_steps", "1", "--report_to", "none", "--gradient_checkpointing", "false",
]  # fmt: skip


@pytest.fixture(scope="module")
def blocks(tmp_path_factory, tokenizer):
    """A model of the sizes that 4 bits take on a CPU."""
    folder = tmp_path_factory.mktemp("blocks")
    tiny_llama(len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def record(folder):
    return json.loads((folder / "report.json").read_text())["stages"][-1]


@pytest.mark.parametrize(("bits", "start"), [("8bit", "demo"), ("4bit", "blocks")])
def test_the_recipe_trains_against_a_quantized_reference(recipe, blocks, tmp_path, bits, start):  # noqa: F811
    """
    It is smaller than the half that is not shared, costs rounded log-probabilities, and leaves the policy as it is.
    """
    model = blocks if start == "blocks" else start
    found = {}
    for name, flags in (("whole", []), (bits, ["--reference_quantization", bits])):
        result = recipe("dpo", "--model_name_or_path", model, "--output_dir", tmp_path / name, *DPO, *flags)
        assert result.returncode == 0, result.stderr[-3000:]
        found[name] = record(tmp_path / name)
    whole, small = found["whole"], found[bits]
    assert small["shared_reference_bytes"] == 0 < whole["shared_reference_bytes"]
    assert small["reference_memory_bytes"] < whole["reference_memory_bytes"]
    first, rounded = (next(row for row in run["history"] if "loss" in row) for run in (whole, small))
    assert first["rewards/chosen"] == 0
    assert rounded["rewards/chosen"] != 0
    assert small["first_loss"] == pytest.approx(0.693147, abs=0.1)
    assert small["frozen_unchanged"] is True
    assert small["selection_digest"] == whole["selection_digest"]
    result = recipe("dpo", "--model_name_or_path", model, "--output_dir", tmp_path / bits, *DPO)
    assert result.returncode == 2
    assert "reference_quantization" in result.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
        ({"fsdp": "full_shard"}, "FSDP cannot shard"),
    ],
)
def test_what_a_quantized_reference_can_not_be_with_is_refused_before_anything(tmp_path, settings, words):
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    with pytest.raises(HFTError, match=words):
        check_quantizable("8bit", args)


def test_a_stage_of_sft_has_no_reference_to_quantise(recipe, tmp_path):  # noqa: F811
    for name, flag in (("sft_then_dpo", "--sft.reference_quantization"), ("sft", "--reference_quantization")):
        result = recipe(name, "--output_dir", tmp_path / "out", flag, "8bit")
        assert result.returncode == 2
        assert f"unknown key {flag[2:]}" in result.stderr
    result = recipe("dpo", "--output_dir", tmp_path / "out", "--reference_quantization", "3bit")
    assert result.returncode == 2
    assert "3bit" in result.stderr


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_8_bit_optimizers_run_with_the_recipe_and_resume(recipe, blocks, tmp_path, optim):  # noqa: F811
    """A state of about 2 bytes a trainable number instead of 8, only for those; interrupted or not, the same bits."""
    flags = ["--model_name_or_path", blocks, "--learning_rate", "1e-3", *DPO]
    results = {}
    for name, extra in (
        ("whole", ["--optim", "adamw_torch"]),
        ("once", ["--optim", optim]),
        ("twice", ["--optim", optim]),
    ):
        output = tmp_path / name
        if name == "twice":  # a run that was stopped after its second step
            result = recipe("dpo", "--output_dir", output, *flags, *extra)
            assert result.returncode == 0, result.stderr[-3000:]
            interrupt(output)
        result = recipe("dpo", "--output_dir", output, *flags, *extra)
        assert result.returncode == 0, result.stderr[-3000:]
        results[name] = record(output)
    numbers = results["once"]["trainable_params"]
    assert results["whole"]["optimizer_state_bytes"] == pytest.approx(8 * numbers, rel=0.01)
    assert results["once"]["optimizer_state_bytes"] < 0.5 * results["whole"]["optimizer_state_bytes"]
    assert results["twice"]["resumed_from_step"] == 2
    before, after = weights(blocks), weights(tmp_path / "once")
    assert all(torch.equal(before[name], after[name]) for name in Selection.load(tmp_path / "once").frozen)
    assert (tmp_path / "once/model.safetensors").read_bytes() == (tmp_path / "twice/model.safetensors").read_bytes()


def interrupt(folder):
    """Leave a finished stage as a process would that was killed after its second step."""
    (folder / "model.safetensors").unlink()
    (folder / "report.json").unlink()
    shutil.rmtree(folder / "checkpoint-4")
    stage = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps({**stage, "record": None}))


def test_the_memory_benchmark_prints_what_every_setting_takes():
    command = [sys.executable, "benchmarks/memory.py", "--hidden", "128", "--layers", "2"]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [line.split("\u2502")[1:-1] for line in result.stdout.splitlines() if line.startswith("\u2502")]
    together = {row[0].strip(): float(row[-1].split()[0]) for row in rows}
    assert len(together) == 12
    assert together["HFT"] < together["HFT, reference of its own"] < together["FFT"]
    assert together["HFT, frozen_quantization nf4"] < together["HFT, frozen_dtype bfloat16"]
    assert together["HFT, optimizer_in_backward"] < together["HFT"]
    assert min(together, key=together.get) == "HFT, nf4, adamw_bnb_8bit and in_backward"
