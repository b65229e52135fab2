"""
A frozen half in 8 or 4 bits:

gradients flow through it, it does not move, and what is saved has the start model's bits.
"""

import hashlib
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file
from test_frozen import saved, start
from test_recipes import recipe  # noqa: F401, a fixture
from training import dpo_trainer, losses, sft_trainer, weights
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from trl import DPOConfig

from hft_trl import HFTConfig, HFTDPOTrainer, HFTError, HFTSFTTrainer, reference
from hft_trl.frozen.half import FrozenHalf
from hft_trl.frozen.quantized_linear import Quantized, QuantizedLinear, packed_away
from hft_trl.trainers.compatibility import check

KINDS = pytest.mark.parametrize("kind", ["int8", "nf4"])


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def quantized(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@KINDS
@pytest.mark.parametrize("size", [(64, 64), (96, 32), (33, 97)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_and_differentiates_with_one_matrix_near_the_original_and_keeps_nothing(kind, size, dtype):
    """Whatever the sizes: where rows are no multiple of a block, bitsandbytes' own CPU kernel gives other numbers."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(*size).to(dtype).requires_grad_(False)
    module = QuantizedLinear(linear, kind)
    whole = module.whole(torch.float32)
    error = (whole - linear.weight.float()).norm() / linear.weight.float().norm()
    assert error < {"int8": 0.01, "nf4": 0.11}[kind]
    assert (
        module.packed.nbytes + module.scale.nbytes
        < {"int8": 1.2, "nf4": 0.6}[kind] * linear.weight.numel() + 4 * size[1]
    )
    kept = []
    inputs = torch.randn(3, 5, size[0], dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        output = module(inputs)
    assert kept == []
    expected = torch.nn.functional.linear(inputs, module.whole(dtype), linear.bias)
    assert torch.equal(output, expected)
    gradient = torch.randn_like(output)
    (found,) = torch.autograd.grad(output, inputs, gradient)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, gradient)[0])


@KINDS
def test_under_autocast_it_gives_the_type_that_a_linear_gives(kind):
    linear = torch.nn.Linear(64, 32).requires_grad_(False)
    inputs = torch.randn(2, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, plain = QuantizedLinear(linear, kind)(inputs), linear(inputs)
    assert output.dtype == plain.dtype == torch.bfloat16
    output.float().sum().backward()
    assert inputs.grad.dtype == torch.float32


@KINDS
def test_code_that_looks_at_the_matrix_sees_it_in_its_own_type(kind):
    """
    Some models cast their inputs to the type of a weight; and there is nothing for a state dict or for DDP to send.
    """
    linear = torch.nn.Linear(64, 32).requires_grad_(False)
    module = QuantizedLinear(linear, kind)
    assert module.weight.dtype == linear.weight.dtype
    assert module.weight.shape == linear.weight.shape
    torch.testing.assert_close(module.weight, linear.weight, atol=0.02, rtol=0)
    assert module.state_dict().keys() == {"bias"}
    assert not list(module.buffers())


@KINDS
def test_casting_a_model_leaves_what_it_holds_quantized_as_it_is(kind):
    """Both the numbers and their scales, whatever the model is cast to, so that it computes what it did."""
    linear = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)
    module = QuantizedLinear(linear, kind)
    before = module.whole(torch.float32)
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.half, lambda model: model.to(torch.float64)):
        assert torch.equal(cast(torch.nn.Sequential(module))[0].whole(torch.float32), before)


def test_a_row_of_zeros_stays_one_and_a_value_that_int8_can_not_take_is_told():
    linear = torch.nn.Linear(64, 4, bias=False).requires_grad_(False)
    linear.weight[1] = 0
    assert not QuantizedLinear(linear, "int8").whole(torch.float32)[1].any()
    linear.weight[0, 0] = 1e6
    assert not QuantizedLinear(linear, "int8").fits
    assert QuantizedLinear(linear, "nf4").fits


@KINDS
@pytest.mark.parametrize("base_kind", ["float32", "bfloat16", "tied", "shards"])
def test_what_is_saved_is_whole_and_its_frozen_half_has_the_bits_of_the_base(
    tulu, tmp_path, tokenizer, kind, base_kind
):
    """In the final folder as in checkpoints, under the original names; nothing says that the model was quantized."""
    base = start(base_kind, tmp_path / "base", tokenizer)
    files = digest(base)
    hft = HFTConfig(frozen_quantization=kind)
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "out", hft, save_strategy="steps", save_steps=2)
    held = {f"{name}.weight": module.packed.clone() for name, module in quantized(trainer.model).items()}
    assert held.keys() == {name for name in trainer.hft_selection.frozen if "proj" in name}
    trainer.train()
    trainer.save_model()
    for name, packed in held.items():
        assert torch.equal(trainer.model.get_submodule(name.removesuffix(".weight")).packed, packed)
    before = saved(base)
    for folder in (tmp_path / "out" / "checkpoint-2", tmp_path / "out"):
        after = saved(folder)
        assert after.keys() == before.keys()
        for name in held:
            assert after[name].dtype == before[name].dtype
        for name in trainer.hft_selection.frozen:
            assert torch.equal(after[name], before[name].to(after[name].dtype)), name
        assert all(not torch.equal(after[n], before[n].float()) for n in trainer.hft_selection.trainable)
        config = json.loads((folder / "config.json").read_text())
        assert "quant" not in json.dumps(config)
        assert config["dtype"] == "float32"
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert all(torch.equal(parameter, after[name].float()) for name, parameter in loaded.items())
    assert digest(base) == files


@pytest.mark.parametrize("storage", [{"frozen_quantization": "nf4"}, {"frozen_dtype": "bfloat16"}])
def test_the_start_model_is_found_at_a_save_in_another_working_directory(base, tulu, tmp_path, monkeypatch, storage):
    monkeypatch.chdir(base.parent)
    settings = {"bf16": True} if "frozen_dtype" in storage else {}
    trainer = sft_trainer(HFTSFTTrainer, base.name, tulu, tmp_path / "out", HFTConfig(**storage), **settings)
    monkeypatch.chdir(tmp_path)
    trainer.save_model()
    before, after = weights(base), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in trainer.hft_selection.frozen)


@pytest.mark.parametrize("method", ["hft", "fft"])
def test_a_stage_chained_in_memory_after_it_is_rejected(base, tulu, tmp_path, method):
    """It would save none of the quantized matrices: they are in no state dict, and the stage before held the files."""
    first = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "a", HFTConfig(frozen_quantization="nf4"))
    first.train()
    with pytest.raises(
        HFTError, match=r"quantized by hft\.frozen_quantization .* save that stage, and pass its folder"
    ):
        sft_trainer(HFTSFTTrainer, first.model, tulu, tmp_path / "b", HFTConfig(method=method))


@KINDS
def test_storage_that_moves_is_found(base, tulu, tmp_path, kind):
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(frozen_quantization=kind))
    name, module = next(iter(quantized(trainer.model).items()))
    trainer.check_frozen()
    for tensor, leaf in ((module.packed, "packed"), (module.scale, "scale")):
        old = tensor.data.clone()
        tensor.data.flatten()[0] += 1
        with pytest.raises(RuntimeError, match=f"{name}.{leaf} moved"):
            trainer.check_frozen()
        tensor.data.copy_(old)
    trainer.check_frozen()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(base, tulu, tmp_path, reentrant):
    runs = []
    for checkpointing in (False, True):
        kwargs = {
            "gradient_checkpointing": checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
        hft = HFTConfig(frozen_quantization="nf4", train_embeddings=False)
        trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, hft, **kwargs)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], abs=1e-6)


def test_resuming_is_identical_to_not_having_stopped(base, tulu, tmp_path):
    """To the last bit."""
    hft = HFTConfig(frozen_quantization="nf4")
    for name, checkpoint in (("a", None), ("b", tmp_path / "a" / "checkpoint-2")):
        trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / name, hft, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_the_best_model_is_put_back(base, ultrafeedback, tmp_path):
    hft = HFTConfig(frozen_quantization="int8")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    every = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path, hft, eval_rows=4, **every, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    trainer.save_model()
    checkpoint = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    after = weights(tmp_path)
    assert all(torch.equal(after[name], checkpoint[name]) for name in trainer.hft_selection.trainable)


@KINDS
def test_the_shared_reference_is_the_quantized_start_and_counts_once(base, ultrafeedback, tmp_path, capsys, kind):
    trainer = dpo_trainer(
        HFTDPOTrainer, base, ultrafeedback, tmp_path, HFTConfig(frozen_quantization=kind), eval_rows=4
    )
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    own, shared = reference.memory(trainer.model, trainer.ref_model)
    frozen = sum(p.nbytes for p in trainer.model.parameters() if not p.requires_grad)
    assert own == trained
    assert shared == frozen
    assert "matrices in" in capsys.readouterr().out
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-6)
    for name, module in quantized(trainer.model).items():
        assert trainer.ref_model.get_submodule(name) is module
    assert trainer.evaluate()["eval_loss"] < 0.69
    tokens = trainer.model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] > 3


def test_a_reference_that_is_passed_stays_whole(base, ultrafeedback, tmp_path):
    own = AutoModelForCausalLM.from_pretrained(base)
    hft = HFTConfig(frozen_quantization="nf4")
    trainer = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path, hft, ref_model=own)
    assert not quantized(trainer.ref_model)
    trainer.train()
    assert losses(trainer)[0] != pytest.approx(0.693147, abs=1e-6)


def test_what_is_no_linear_or_in_no_file_stays_whole_and_it_is_said(tulu, tmp_path, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("hft_trl"), "propagate", True)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    base = start("float32", tmp_path / "gone", tokenizer)
    hft = HFTConfig(frozen_quantization="nf4")
    for folder in (tmp_path / "gpt2", base):
        trainer = sft_trainer(HFTSFTTrainer, folder, tulu, tmp_path / "out", hft)
        if folder == base:
            (base / "model.safetensors").unlink()
            model = tiny_llama(len(tokenizer))
            trainer.hft_selection.apply(model)
            model.config._name_or_path = str(base)
            half = FrozenHalf(model, dict.fromkeys(trainer.hft_selection.frozen, ""))
            Quantized("nf4").settle(SimpleNamespace(frozen_half=half, _revision=None), model, None)
            assert not quantized(model)
        else:
            assert not quantized(trainer.model)
            trainer.train()
            trainer.save_model()
        assert "frozen matrices whole, such as" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    ("hft", "settings", "words"),
    [
        ({"share_reference": False}, {}, "hft.share_reference is false"),
        ({}, {"sync_ref_model": True}, "sync_ref_model moves the reference"),
        ({}, {"precompute_ref_log_probs": True}, "precompute_ref_log_probs uses the reference before"),
        ({}, {"fsdp": "full_shard"}, "FSDP cannot shard"),
    ],
)
def test_what_it_can_not_be_with_is_refused_before_a_model_is_loaded(tmp_path, hft, settings, words):
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    hft = {"frozen_quantization": "int8", **hft}
    with pytest.raises(HFTError, match=words):
        check(args, HFTConfig(**hft))
    check(args, HFTConfig(method="fft", **hft))


def test_two_ways_to_hold_the_frozen_half_are_one_too_many():
    with pytest.raises(HFTError, match=r"hft\.frozen_dtype is 'bfloat16' and hft\.frozen_quantization is 'nf4'"):
        HFTConfig(frozen_dtype="bfloat16", frozen_quantization="nf4")


def test_full_fine_tuning_has_nothing_to_quantise(base, tulu, tmp_path):
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(method="fft", frozen_quantization="nf4"))
    assert not quantized(trainer.model)


def test_the_recipe_trains_both_stages_with_it_and_takes_it_for_a_setting_of_the_weights(recipe, tmp_path):  # noqa: F811
    steps = ["--sft.max_steps", 2, "--dpo.max_steps", 2, "--output_dir", tmp_path]
    result = recipe("sft_then_dpo", *steps, "--hft.frozen_quantization", "nf4")
    assert result.returncode == 0, result.stderr[-3000:]
    sft, dpo = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert dpo["total_params"] == sft["total_params"] == sum(w.numel() for w in weights(tmp_path / "sft").values())
    assert dpo["reference_memory_bytes"] == 4 * dpo["trainable_params"]
    result = recipe("sft_then_dpo", *steps)
    assert result.returncode == 2
    assert "frozen_quantization" in result.stderr


def test_numbers_that_packing_hides_are_counted(base, tulu, tmp_path):
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(frozen_quantization="nf4"))
    held = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert held + packed_away(trainer.model) == sum(weight.numel() for weight in weights(base).values())
