"""The reference: the policy before its first step, its frozen half stored once, or quantised."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from test_trainers import QUIET, HFTKTOTrainer, dpo_trainer, losses, weights
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, KTOConfig

from hft_trl import HFTConfig, HFTDPOTrainer, HFTError
from hft_trl.chat import load_tokenizer
from hft_trl.data import preference_dataset
from hft_trl.reference import alias_copy, hollow_copy, memory

OFF = HFTConfig(share_reference=False)


def test_the_frozen_half_of_policy_and_reference_is_stored_once(base, ultrafeedback, tmp_path, capsys):
    trainer = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path)
    for when in ("before", "after"):
        policy, theirs = dict(trainer.model.named_parameters()), dict(trainer.ref_model.named_parameters())
        assert policy.keys() == theirs.keys()
        for name, parameter in policy.items():
            assert (parameter.data_ptr() == theirs[name].data_ptr()) == (name in trainer.hft_selection.frozen), (when, name)
        frozen = sum(policy[name].nbytes for name in trainer.hft_selection.frozen)
        total = sum(parameter.nbytes for parameter in policy.values())
        assert memory(trainer.model, trainer.ref_model) == (total - frozen, frozen)
        if when == "before":
            assert f"reference: shares {frozen:,} of {total:,} bytes with the policy." in capsys.readouterr().out
            trainer.train()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_weights_are_those_of_an_unshared_run_to_the_last_bit(base, ultrafeedback, tmp_path, bf16, checkpointing):
    runs = []
    for name, hft in (("shared", HFTConfig()), ("unshared", OFF)):
        trainer = dpo_trainer(
            HFTDPOTrainer, base, ultrafeedback, tmp_path / name, hft, bf16=bf16, gradient_checkpointing=checkpointing
        )
        trainer.train()
        trainer.save_model()
        runs.append([row for row in trainer.state.log_history if "loss" in row])
    same = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected")
    assert [[row[key] for key in same] for row in runs[0]] == [[row[key] for key in same] for row in runs[1]]
    a, b = tmp_path / "shared", tmp_path / "unshared"
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
