"""SFT and DPO in bf16 under ZeRO-2 and ZeRO-3, two real processes, without the recipes."""

import json

import pytest
import torch
from conftest import tiny_llama
from launching import launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hft_trl import HFTConfig, Selection, select

pytestmark = pytest.mark.deepspeed


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer):
    """One base model, as a file in float32 and as one in bfloat16."""
    folders = []
    for dtype in (torch.float32, torch.bfloat16):
        folders.append(tmp_path_factory.mktemp("base"))
        tiny_llama(len(tokenizer)).to(dtype).save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def run(request, bases, tmp_path_factory):
    out = tmp_path_factory.mktemp("bfloat16")
    launch(request.param, "in_bfloat16.py", *bases, out, flags=())  # mixed precision as in the shipped file
    return out, [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)], bases[1]


def test_a_float32_base_is_refused_before_training(run):
    """DeepSpeed would cast it whole, and with it the frozen half."""
    for seen in run[1]:
        assert "bfloat16 rounds" in seen["rounded"]
        assert "mixed_precision 'no'" in seen["rounded"]


def test_frozen_dtype_is_refused(run):
    for seen in run[1]:
        assert "hft.frozen_dtype is 'bfloat16', but DeepSpeed" in seen["frozen_dtype"]


def test_the_frozen_half_has_the_bytes_of_the_start_file(run):
    out, _, base = run
    for stage, start in (("sft", base), ("dpo", out / "sft")):
        before, after = load_file(start / "model.safetensors"), load_file(out / stage / "model.safetensors")
        selection = json.loads((out / stage / "hft_selection.json").read_text())
        for name in selection["frozen"]:
            assert before[name].dtype == after[name].dtype == torch.bfloat16
            assert torch.equal(before[name], after[name]), name
        assert any(not torch.equal(before[name], after[name]) for name in selection["trainable"])


def test_the_optimizer_keeps_float32_moments_of_what_is_trained_only(run):
    out, seen, base = run
    shapes = {name: tensor.numel() for name, tensor in load_file(base / "model.safetensors").items()}
    for stage in ("sft", "dpo"):
        selection = json.loads((out / stage / "hft_selection.json").read_text())
        trained = sum(shapes[name] for name in selection["trainable"])
        assert {dtype for facts in seen for dtype in facts[stage]["moments"]} == {"torch.float32"}
        assert sum(facts[stage]["moments"]["torch.float32"] for facts in seen) == pytest.approx(trained, rel=1e-2)


def test_dpo_starts_at_the_reference(run):
    """The first loss is ln 2, which it is only where policy and reference are the same bits."""
    for seen in run[1]:
        assert seen["dpo"]["log"][0]["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_importance_by_weights_is_that_of_the_whole_model(run):
    """Though ZeRO-3 has divided the weights when the half is chosen."""
    out, _, _ = run
    first, second = (Selection.load(out / stage) for stage in ("sft", "dpo"))
    model = AutoModelForCausalLM.from_pretrained(out / "sft")
    assert second.trainable == select(model, HFTConfig(strategy="importance"), previous=first).trainable
