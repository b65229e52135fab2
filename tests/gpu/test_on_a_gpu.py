"""Risks on a GPU: kernels that take one type, NCCL, devices. The bodies run on a CPU as well where they can."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_llama
from devices import GPU, on, on_each_device
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from training import ResumableSFTTrainer, dpo_trainer, losses, sft_trainer
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import is_flash_attn_2_available

from hft_trl import HFTConfig, HFTDPOTrainer, HFTSFTTrainer
from hft_trl.frozen.quantized_linear import QuantizedLinear
from hft_trl.reference import copied, tie
from hft_trl.weights import PIECE, fingerprint, fingerprints, full

FLASH = pytest.param(
    "flash_attention_2",
    marks=pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed or needs a GPU"),
)


def frozen_is_kept(base, folder, frozen) -> bool:
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    return all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in frozen)


@on_each_device
@pytest.mark.parametrize("attention", ["sdpa", "eager", FLASH])
@pytest.mark.parametrize("embeddings", [True, False])
def test_a_frozen_half_in_bfloat16_trains_with_every_attention(
    tulu, tokenizer, tmp_path, attention, embeddings, device
):
    """With norms of queries and keys of which one is frozen, and the embedding frozen or not."""
    base = tmp_path / "base"
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    Qwen3ForCausalLM(Qwen3Config(**shape, **heads, tie_word_embeddings=False)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    hft = HFTConfig(frozen_dtype="bfloat16", train_embeddings=embeddings)
    init = {"dtype": "float32", "attn_implementation": attention}
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "out", hft, **on(device), model_init_kwargs=init)
    trainer.train()
    trainer.save_model()
    assert frozen_is_kept(base, tmp_path / "out", trainer.hft_selection.frozen)


@on_each_device
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_frozen_half_computes_as_on_a_cpu_and_survives_casts(base, tulu, tmp_path, kind, device):
    torch.manual_seed(0)
    module = QuantizedLinear(torch.nn.Linear(128, 64, bias=False).to(device).requires_grad_(False), kind)
    before = module.whole(torch.float32)
    torch.testing.assert_close(copy.deepcopy(module).cpu().whole(torch.float32), before.cpu(), atol=1e-3, rtol=0)
    assert torch.equal(module.bfloat16().whole(torch.float32), before)
    hft = HFTConfig(frozen_quantization=kind)
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "out", hft, **on(device))
    trainer.train()
    trainer.save_model()
    assert frozen_is_kept(base, tmp_path / "out", trainer.hft_selection.frozen)


@pytest.mark.parametrize("device", [GPU])
def test_a_reference_follows_the_policy_to_the_gpu(tokenizer, device):
    policy = tiny_llama(len(tokenizer)).requires_grad_(False)
    policy.lm_head.requires_grad_(True)
    reference = copied(policy, hollow=True)
    tie(policy, reference)
    policy.to(device)
    tie(policy, reference)
    assert all(parameter.is_cuda for parameter in reference.parameters())


@on_each_device
def test_dpo_of_a_model_object_on_the_cpu_starts_at_ln_2(base, ultrafeedback, tmp_path, device):
    policy = AutoModelForCausalLM.from_pretrained(base)
    trainer = dpo_trainer(HFTDPOTrainer, policy, ultrafeedback, tmp_path, **on(device), eval_rows=8)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
    assert {parameter.device.type for parameter in trainer.ref_model.parameters()} == {device}


@on_each_device
def test_a_shard_in_main_memory_is_gathered_where_only_nccl_is(tmp_path, device):
    """As under FSDP2 with fsdp_offload_params."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{tmp_path / 'store'}", timedelta(minutes=2), world_size=1, rank=0)
    try:
        mesh, whole = init_device_mesh(device, (1,)), torch.arange(12.0).reshape(3, 4)
        shard = DTensor.from_local(whole, mesh, [Shard(0)], run_check=False)
        assert shard.to_local().device.type == "cpu"
        assert fingerprint(full(shard)) == fingerprint(whole)
    finally:
        dist.destroy_process_group()


@on_each_device
def test_a_half_by_gradients_is_drawn_again_on_resuming(base, tulu, tmp_path, device):
    hft = HFTConfig(strategy="importance", importance="gradient_norm")
    settings = {**on(device), "save_strategy": "steps", "save_steps": 2}
    first = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, hft, **settings)
    first.train()
    again = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, hft, **settings)
    assert again.hft_selection == first.hft_selection
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3, PIECE - 1, 2 * PIECE + 1])
def test_a_fingerprint_is_that_of_the_same_bits_on_a_cpu(device, dtype, size):
    """Of a view that is not contiguous too, and of NaNs, which a GPU may cast to other bits."""
    bits = torch.randint(-(2**31), 2**31 - 1, (size,), dtype=torch.int32)
    tensor = bits.view(torch.float32)
    tensor = tensor.view(dtype)[::2] if dtype == torch.bfloat16 else tensor
    there = tensor.to(device) if tensor.is_contiguous() else bits.to(device).view(dtype)[::2]
    assert fingerprint(there) == fingerprint(tensor)
    assert fingerprint(there, torch.float32) == fingerprint(tensor, torch.float32)
    assert fingerprints([("a", there), ("b", there)]) == dict.fromkeys("ab", fingerprint(tensor))


@on_each_device
def test_one_flipped_bit_of_a_frozen_parameter_stops_a_save(base, tulu, tmp_path, device):
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "out", HFTConfig(), **on(device))
    trainer.train()
    name = max(trainer.hft_selection.frozen, key=lambda name: trainer.model.get_parameter(name).numel())
    words = trainer.model.get_parameter(name).data.reshape(-1).view(torch.int32)
    words[-1] ^= 1
    with pytest.raises(RuntimeError, match=f"the frozen parameter {name} moved"):
        trainer.save_model()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    words[-1] ^= 1
    trainer.save_model()
