"""Names are those of the model's class, whatever torch.compile and checkpoint wrappers have made of them."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from training import dpo_trainer, losses, sft_trainer
from trl import DPOConfig

from hft_trl import HFTConfig, HFTDPOTrainer, HFTSFTTrainer, select
from hft_trl.frozen.elements import FrozenElements
from hft_trl.recipe import parse_stage
from hft_trl.recipe.measure import measure
from hft_trl.reference import check_is_start, copied, memory, tie
from hft_trl.selection import find_units
from hft_trl.weights import named_modules, named_parameters, plain_name

COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


def layers_checkpointed(model):
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = checkpoint_wrapper(layer)
    return model


def layers_compiled(model):
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend="eager")
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPS = [layers_checkpointed, layers_compiled, lambda model: layers_compiled(layers_checkpointed(model))]


@pytest.mark.parametrize("wrap", [*WRAPS, compiled, lambda model: compiled(layers_checkpointed(model))])
def test_names_are_plain_however_a_model_is_wrapped(tokenizer, wrap):
    before, wrapped = tiny_llama(len(tokenizer)), wrap(tiny_llama(len(tokenizer)))
    names = [name for name, _ in before.named_parameters()]
    assert [name for name, _ in wrapped.named_parameters()] != names
    assert [name for name, _ in named_parameters(wrapped)] == names
    assert named_modules(wrapped).keys() == dict(before.named_modules()).keys()
    assert all(plain_name(name) == name for name in names)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("strategy", ["category", "element"])
def test_units_and_selection_are_the_same_and_apply_to_a_wrapped_model(tokenizer, wrap, strategy):
    plain, wrapped = tiny_llama(len(tokenizer)), wrap(tiny_llama(len(tokenizer)))
    assert find_units(plain) == find_units(wrapped)
    selection = select(plain, HFTConfig(strategy=strategy))
    assert select(wrapped, HFTConfig(strategy=strategy)).digest == selection.digest
    selection.apply(wrapped)
    assert sorted(n for n, p in named_parameters(wrapped) if p.requires_grad) == sorted(selection.trainable)
    if strategy == "element":
        elements = FrozenElements()
        elements.settle(SimpleNamespace(hft_selection=selection), wrapped, None)
        assert elements._parts.keys() == selection.masked.keys()


@pytest.mark.parametrize("wrap", [*WRAPS, compiled])
def test_a_reference_is_compared_and_tied_by_plain_names(tokenizer, wrap):
    policy = tiny_llama(len(tokenizer))
    own = copied(policy, hollow=True)
    selection = select(policy, HFTConfig())
    selection.apply(policy)
    frozen = sum(p.nbytes for p in policy.parameters() if not p.requires_grad)
    policy, own = wrap(policy), wrap(own)
    tie(policy, own)
    check_is_start(policy, own)
    assert memory(policy, own)[1] == frozen > 0


@pytest.mark.parametrize("method", ["hft", "fft"])
def test_a_compiled_dpo_trains_with_the_same_losses_and_shares_the_frozen_half(base, ultrafeedback, tmp_path, method):
    trainers = []
    for name, settings in (("plain", {}), ("compiled", COMPILED)):
        hft = HFTConfig(method=method)
        trainer = dpo_trainer(
            HFTDPOTrainer, base, ultrafeedback, tmp_path / name, hft, **settings, save_strategy="steps", save_steps=2
        )
        trainer.train()
        trainer.save_model()
        trainers.append(trainer)
    plain, under_compile = trainers
    assert losses(plain) == losses(under_compile)
    assert losses(plain)[0] == pytest.approx(0.693147, abs=1e-5)
    assert isinstance(under_compile.model_wrapped, torch._dynamo.OptimizedModule)
    assert memory(under_compile.model, under_compile.ref_model) == memory(plain.model, plain.ref_model)
    files = [tmp_path / name / "model.safetensors" for name in ("plain", "compiled")]
    assert files[0].read_bytes() == files[1].read_bytes()
    flags = ["--model_name_or_path", str(base), "--dataset_name", "demo", "--output_dir", str(tmp_path / "stage")]
    stage, _ = parse_stage("dpo", DPOConfig, [*flags, "--method", method])
    reports = [measure(stage, trainer, None) for trainer in trainers]
    for field in ("trainable_params", "total_params", "reference_memory_bytes", "shared_reference_bytes"):
        assert getattr(reports[0], field) == getattr(reports[1], field), field
    again = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path / "again", HFTConfig(method=method), **COMPILED)
    again.train(resume_from_checkpoint=tmp_path / "compiled" / "checkpoint-2")
    again.save_model()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == files[0].read_bytes()


def test_a_compiled_training_of_elements_checks_them(base, tulu, tmp_path):
    runs = []
    for name, settings in (("plain", {}), ("compiled", COMPILED)):
        trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / name, HFTConfig(strategy="element"), **settings)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]
