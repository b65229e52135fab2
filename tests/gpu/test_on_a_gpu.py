"""What only a GPU can settle: kernels that take one type, NCCL, devices, sums that don't come out alike twice."""

import copy
import importlib.util
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_llama
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from training import ResumableSFTTrainer, dpo_trainer, losses, sft_trainer
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hft_trl import HFTConfig, HFTDPOTrainer, HFTSFTTrainer
from hft_trl.frozen.quantized_linear import QuantizedLinear
from hft_trl.reference import hollow_copy, tie
from hft_trl.weights import fingerprint, full

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
ON_GPU = {"use_cpu": False, "bf16": True}
FLASH = pytest.param(
    "flash_attention_2",
    marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed"),
)


def frozen_is_kept(base, folder, frozen) -> bool:
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    return all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in frozen)


@pytest.mark.parametrize("attention", ["sdpa", "eager", FLASH])
@pytest.mark.parametrize("embeddings", [True, False])
def test_a_frozen_half_in_bfloat16_trains_with_every_attention(tulu, tokenizer, tmp_path, attention, embeddings):
    """With norms of queries and keys of which one is frozen, and the embedding frozen or not."""
    base = tmp_path / "base"
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    Qwen3ForCausalLM(Qwen3Config(**shape, **heads, tie_word_embeddings=False)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    hft = HFTConfig(frozen_dtype="bfloat16", train_embeddings=embeddings)
    init = {"dtype": "float32", "attn_implementation": attention}
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "out", hft, **ON_GPU, model_init_kwargs=init)
    trainer.train()
    trainer.save_model()
    assert frozen_is_kept(base, tmp_path / "out", trainer.hft_selection.frozen)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_frozen_half_computes_as_on_a_cpu_and_survives_casts(base, tulu, tmp_path, kind):
    torch.manual_seed(0)
    module = QuantizedLinear(torch.nn.Linear(128, 64, bias=False).cuda().requires_grad_(False), kind)
    before = module.whole(torch.float32)
    torch.testing.assert_close(copy.deepcopy(module).cpu().whole(torch.float32), before.cpu(), atol=1e-3, rtol=0)
    assert torch.equal(module.bfloat16().whole(torch.float32), before)
    hft = HFTConfig(frozen_quantization=kind)
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "out", hft, **ON_GPU)
    trainer.train()
    trainer.save_model()
    assert frozen_is_kept(base, tmp_path / "out", trainer.hft_selection.frozen)


def test_a_reference_follows_the_policy_to_the_gpu(tokenizer):
    policy = tiny_llama(len(tokenizer)).requires_grad_(False)
    policy.lm_head.requires_grad_(True)
    reference = hollow_copy(policy)
    tie(policy, reference)
    policy.cuda()
    tie(policy, reference)
    assert all(parameter.is_cuda for parameter in reference.parameters())


def test_dpo_of_a_model_object_on_the_cpu_starts_at_ln_2(base, ultrafeedback, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(base)
    trainer = dpo_trainer(HFTDPOTrainer, policy, ultrafeedback, tmp_path, **ON_GPU, eval_rows=8)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
    assert all(parameter.is_cuda for parameter in trainer.ref_model.parameters())


def test_a_shard_in_main_memory_is_gathered_where_only_nccl_is(tmp_path):
    """As under FSDP2 with fsdp_offload_params."""
    dist.init_process_group("nccl", f"file://{tmp_path / 'store'}", timedelta(minutes=2), world_size=1, rank=0)
    try:
        mesh, whole = init_device_mesh("cuda", (1,)), torch.arange(12.0).reshape(3, 4)
        shard = DTensor.from_local(whole, mesh, [Shard(0)], run_check=False)
        assert shard.to_local().device.type == "cpu"
        assert fingerprint(full(shard)) == fingerprint(whole)
    finally:
        dist.destroy_process_group()


def test_a_half_by_gradients_is_drawn_again_on_resuming(base, tulu, tmp_path):
    hft = HFTConfig(strategy="importance", importance="gradient_norm")
    settings = {**ON_GPU, "save_strategy": "steps", "save_steps": 2}
    first = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, hft, **settings)
    first.train()
    again = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, hft, **settings)
    assert again.hft_selection == first.hft_selection
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_bytes_of_a_run_are_those_of_a_run_that_was_resumed(base, tulu, tmp_path):
    settings = {**ON_GPU, "save_strategy": "steps", "save_steps": 2, "full_determinism": True}
    for name, checkpoint in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
        trainer = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / name, HFTConfig(), **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    file = "model.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()
