"""
FSDP2 holds what learns in float32; what it saves has the start model's types, so that the next stage can load it.
"""

import json
from pathlib import Path

import pytest
import torch
from launch import finish, on_cpu, start
from safetensors.torch import load_file
from transformers import AutoConfig

SCRIPT = Path(__file__).with_name("bfloat16.py")


@pytest.fixture(scope="module")
def output(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bfloat16")
    finish(start(on_cpu("fsdp2.yaml", folder), SCRIPT, base, folder))
    return folder


@pytest.mark.parametrize("kind", ["FULL", "SHARDED"])
def test_sft_leaves_a_model_in_the_start_models_type_that_dpo_starts_from(output, kind):
    """All tensors, and the type that config.json names; the frozen half bit for bit."""
    before = output / "start"
    for stage in ("sft", "dpo"):
        folder = output / f"{kind}-{stage}"
        old, new = (load_file(path / "model.safetensors") for path in (before, folder))
        assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
        assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
        frozen = json.loads((folder / "hft_selection.json").read_text())["frozen"]
        assert len(frozen) > 10
        assert all(torch.equal(old[name], new[name]) for name in frozen)
        assert any(not torch.equal(old[name], new[name]) for name in old)
        before = folder
    for losses in output.glob("losses-*.json"):
        assert json.loads(losses.read_text())[f"{kind}-dpo"][0] == pytest.approx(0.6931, abs=3e-3)


@pytest.mark.parametrize("kind", ["FULL", "SHARDED"])
def test_checkpoints_hold_the_float32_weights_that_resuming_needs(output, kind):
    """A resumed run ends in the same bytes, though its weights in training have more digits than the model on disk."""
    whole, resumed = output / f"{kind}-sft", output / f"{kind}-resumed"
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    losses = json.loads((output / "losses-0.json").read_text())
    assert losses[f"{kind}-resumed"] == losses[f"{kind}-sft"]
    if kind == "FULL":
        weights = torch.load(whole / "checkpoint-1" / "pytorch_model_fsdp.bin", weights_only=True)
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16, torch.float32}
