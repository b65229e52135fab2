"""What TRL and transformers can do, a half can do too: what is frozen keeps its bits, and the rest is trained."""

import math

import pytest
import torch
from conftest import QUIET
from datasets import Dataset
from torch._dynamo.utils import counters
from training import losses, weights
from trl import DPOConfig, SFTConfig
from trl.chat_template_utils import qwen3_training_chat_template

from hft_trl import HFTConfig, HFTDPOTrainer, HFTSFTTrainer
from hft_trl.chat import load_tokenizer
from hft_trl.recipe.rows import preference_dataset, sft_dataset
from hft_trl.weights import fingerprint

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST = {**EVALUATED, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
MATRICES = HFTConfig(train_final_norm=False, exclude=["norm"])
"""Muon takes matrices only."""
LOW_RANK = {"optim_target_modules": "all-linear", "optim_args": "rank=4,update_proj_gap=1"}

SFT = {
    "plain": {},
    "packing, bfd": {"packing": True, "packing_strategy": "bfd", "max_length": 128},
    "packing, bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 40},
    "packing, wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 64},
    "loss_type dft": {"loss_type": "dft"},
    "neftune": {"neftune_noise_alpha": 5},
    "load_best_model_at_end": BEST,
    "save_only_model": {"save_strategy": "steps", "save_steps": 1, "save_only_model": True},
    "streaming": {},
    "tool calls": {},
    "muon": {},
    "adafactor": {"optim": "adafactor"},
    "lion": {"optim": "lion_32bit"},
    "ademamix": {"optim": "ademamix"},
    "galore": {"optim": "galore_adamw", **LOW_RANK},
    "apollo": {"optim": "apollo_adamw", **LOW_RANK},
    "cosine_with_min_lr": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
}
DPO = {  # with the loss of the first step, where policy and reference are the same
    "sigmoid": ({}, math.log(2)),
    "exo_pair, label_smoothing": ({"loss_type": ["exo_pair"], "label_smoothing": 1e-3}, None),
    "ipo": ({"loss_type": ["ipo"], "beta": 0.1}, 25),
    "apo_zero": ({"loss_type": ["apo_zero"]}, 1),
    "robust, label_smoothing": ({"loss_type": ["robust"], "label_smoothing": 0.1}, math.log(2)),
    "sigmoid_norm": ({"loss_type": ["sigmoid_norm"], "beta": 5}, math.log(2)),
    "several losses": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, None),
    "sync_ref_model": ({"sync_ref_model": True, "ref_model_sync_steps": 1}, math.log(2)),
    "padding_free": ({"padding_free": True}, None),  # TRL 1.16 warns, and pads
    "gradient_checkpointing": ({"gradient_checkpointing": True}, math.log(2)),
    "load_best_model_at_end": (BEST, math.log(2)),
    "save_only_model": ({"save_strategy": "steps", "save_steps": 1, "save_only_model": True}, math.log(2)),
}


def check(trainer, base, folder) -> list[float]:
    """Train and save. The frozen half has the bits of the base, and every other parameter has moved."""
    trainer.train()
    trainer.save_model()
    before, after = weights(base), weights(folder)
    moved = {name for name in before if fingerprint(before[name]) != fingerprint(after[name])}
    assert moved == set(trainer.hft_selection.trainable)
    assert trainer.hft_selection.frozen
    assert all(math.isfinite(value) for value in losses(trainer))
    return losses(trainer)


def conversation_with_a_tool(number: int) -> dict:
    call = {"type": "function", "function": {"name": "look", "arguments": {"person": number}}}
    return {
        "messages": [
            {"role": "system", "content": "Look before you answer."},
            {"role": "user", "content": f"Where does person {number} live?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "look", "content": f"city {number % 7}"},
            {"role": "assistant", "content": f"In city {number % 7}."},
        ],
        "tools": [{"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}],
    }


@pytest.fixture(scope="module")
def plain(base, tulu, tmp_path_factory):
    """The losses of a run without any of it."""
    folder = tmp_path_factory.mktemp("plain")
    args = SFTConfig(str(folder), **{**QUIET, "max_steps": 2, "learning_rate": 1e-2, "assistant_only_loss": True})
    tokenizer = load_tokenizer(str(base))
    trainer = HFTSFTTrainer(str(base), args=args, train_dataset=sft_dataset(tulu, "t"), processing_class=tokenizer)
    return check(trainer, base, folder)


@pytest.mark.parametrize("feature", SFT)
def test_a_feature_of_sft_trains_the_chosen_half_only(base, tulu, tmp_path, plain, feature):
    settings = {"max_steps": 2, "learning_rate": 1e-2, "assistant_only_loss": True, **SFT[feature]}
    args = SFTConfig(str(tmp_path), **{**QUIET, **settings})
    tokenizer, rows, given = load_tokenizer(str(base)), sft_dataset(tulu, "tulu"), {}
    hft = HFTConfig()
    if feature == "tool calls":
        tokenizer.chat_template = qwen3_training_chat_template
        rows = sft_dataset(Dataset.from_list([conversation_with_a_tool(number) for number in range(8)]), "tools")
    if feature == "muon":
        given["optimizer_cls_and_kwargs"] = (torch.optim.Muon, {"lr": 1e-2})
        hft = MATRICES
    trainer = HFTSFTTrainer(
        model=str(base),
        args=args,
        train_dataset=rows.to_iterable_dataset() if feature == "streaming" else rows,
        eval_dataset=rows.select(range(8)) if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        hft_config=hft,
        **given,
    )
    found = check(trainer, base, tmp_path)
    if feature in ("loss_type dft", "neftune", "tool calls") or "packing" in feature:
        assert found[0] != pytest.approx(plain[0], abs=1e-6)
    if "packing" in feature:  # two rows in one, or one row in two
        assert (len(trainer.train_dataset) > len(rows)) == ("split" in feature)
        assert len(trainer.train_dataset) != len(rows)
    if feature == "tool calls":
        text = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
        assert all(word in text for word in ("look", "person", "city 0"))


@pytest.mark.parametrize("feature", DPO)
def test_a_feature_of_dpo_trains_the_chosen_half_only(base, ultrafeedback, tmp_path, feature):
    settings, first = DPO[feature]
    args = DPOConfig(str(tmp_path), **{**QUIET, "max_steps": 2, "learning_rate": 1e-2, **settings})
    pairs = preference_dataset(ultrafeedback, "prefs")
    trainer = HFTDPOTrainer(
        model=str(base),
        args=args,
        train_dataset=pairs,
        eval_dataset=pairs.select(range(8)) if args.eval_strategy != "no" else None,
        processing_class=load_tokenizer(str(base)),
        hft_config=HFTConfig(),
    )
    found = check(trainer, base, tmp_path)
    assert first is None or found[0] == pytest.approx(first, rel=1e-5)


def test_a_trainer_follows_its_own_arguments_where_an_earlier_one_had_others(base, tulu, ultrafeedback, tmp_path):
    """Also where both were made before the first trainer, as recipes do: accelerate keeps the first one's state."""
    first = SFTConfig(str(tmp_path), **{**QUIET, "max_steps": 1})
    compiled = {"bf16": True, "torch_compile": True, "torch_compile_backend": "eager"}
    second = DPOConfig(str(tmp_path), **{**QUIET, "max_steps": 1, **compiled})
    tokenizer = load_tokenizer(str(base))
    HFTSFTTrainer(str(base), args=first, train_dataset=sft_dataset(tulu, "rows"), processing_class=tokenizer).train()
    counters.clear()
    pairs = preference_dataset(ultrafeedback, "rows")
    trainer = HFTDPOTrainer(str(base), args=second, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert counters["frames"]["ok"] > 0
    torch.compiler.reset()
