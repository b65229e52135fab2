"""
Models of other kinds trained under FSDP2, their frozen half sharded and whole in every process; and what is refused.

`accelerate launch ... replicated.py BASE OUTPUT`, where BASE holds a tokenizer.
"""

import json
import os
import sys
from pathlib import Path

import fsdp_on_cpu
import torch
from accelerate import PartialState
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from trl import DPOConfig, SFTConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import QUIET, tiny_llama, tulu_row, ultrafeedback_row
from leaving import leave
from training import ResumableDPOTrainer, ResumableSFTTrainer

from hft_trl import HFTConfig, HFTError
from hft_trl.chat import load_tokenizer
from hft_trl.recipe.rows import preference_dataset, sft_dataset
from hft_trl.weights import plain_name

VOCABULARY = 300
SIZES = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCABULARY}
BF16 = {"bf16": True}


def gpt2() -> PreTrainedModel:
    """Biases, tied embeddings, and an `nn.LayerNorm`, which `frozen_dtype` leaves as it is."""
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=128, **SIZES))


def mixtral() -> PreTrainedModel:
    """Experts in one module, of whose two parameters one learns."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 128}
    return MixtralForCausalLM(MixtralConfig(**shape, **experts, **SIZES))


# Name of a pair of trainings: stage, model, what is selected, what else is set
PAIRS = {
    "experts": ("sft", mixtral, {}, {}),
    "norms-dpo": ("dpo", gpt2, {"frozen_dtype": "bfloat16"}, BF16),
    "bfloat16": ("sft", lambda: tiny_llama(VOCABULARY).bfloat16(), {}, BF16),
    # whole layers, and the tied embedding, are frozen
    "layers": (
        "sft",
        lambda: tiny_llama(VOCABULARY, tie_word_embeddings=True),
        {"strategy": "layer", "train_embeddings": False, "train_lm_head": False, "train_final_norm": False},
        {},
    ),
    "layers-dpo": ("dpo", lambda: tiny_llama(VOCABULARY), {"strategy": "layer", "train_lm_head": False}, {}),
    # accelerate wraps the policy's layers, not the reference's, in modules of another name
    "checkpointed-dpo": ("dpo", lambda: tiny_llama(VOCABULARY), {"strategy": "importance"}, {}),
}


def trainer_of(stage: str, model: str | PreTrainedModel, base: Path, output: Path, hft: dict, settings: dict):
    config, kind, prepare, row = {
        "sft": (SFTConfig, ResumableSFTTrainer, sft_dataset, tulu_row),
        "dpo": (DPOConfig, ResumableDPOTrainer, preference_dataset, ultrafeedback_row),
    }[stage]
    return kind(
        model=model,
        args=config(str(output), **{**QUIET, "max_steps": 2, **settings}),
        train_dataset=prepare(Dataset.from_list([row(n) for n in range(16)]), "rows"),
        processing_class=load_tokenizer(str(base), "tulu"),
        hft_config=HFTConfig(**hft),
    )


def train(name: str, base: Path, output: Path, replicate: bool) -> dict:
    stage, build, hft, settings = PAIRS[name]
    start = output / f"{name}-start"
    if PartialState().is_main_process and not start.exists():
        torch.manual_seed(0)
        build().save_pretrained(start)
    PartialState().wait_for_everyone()
    dtype = "bfloat16" if name == "bfloat16" else "float32"
    output = output / f"{name}-{'replicated' if replicate else 'sharded'}"
    settings = {**settings, "model_init_kwargs": {"dtype": dtype}}
    os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = str(name.startswith("checkpointed")).lower()
    trainer = trainer_of(stage, str(start), base, output, {**hft, "replicate_frozen": replicate}, settings)
    trainer.train()
    trainer.save_model()
    named = {plain_name(name): parameter for name, parameter in trainer.model.named_parameters()}
    reference = dict(trainer.ref_model.named_parameters()) if stage == "dpo" else {}
    whole = sorted(name for name, parameter in named.items() if not isinstance(parameter, DTensor))
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "frozen": sorted(name for name, parameter in named.items() if not parameter.requires_grad),
        "whole": whole,
        "types": sorted({str(named[name].dtype) for name in whole}),
        "of_reference": sorted(name for name, parameter in reference.items() if not isinstance(parameter, DTensor)),
        "stored_once": [n for n in whole if n in reference and reference[n].data_ptr() == named[n].data_ptr()],
    }


def refusals(base: Path, output: Path) -> dict[str, str]:
    """What is said of settings that don't fit."""
    said = {}

    def refused(name: str, stage: str = "sft", model: str | PreTrainedModel = str(base), **settings) -> None:
        try:
            trainer_of(stage, model, base, output / name, {"replicate_frozen": True}, settings)
        except HFTError as error:
            said[name] = str(error)

    refused("uncast", bf16=True)
    for stage in ("sft", "dpo"):
        os.environ["FSDP_IGNORED_MODULES"] = "model.norm"
        refused(f"ignored-{stage}", stage)
        del os.environ["FSDP_IGNORED_MODULES"]
    other = tiny_llama(VOCABULARY)
    if PartialState().process_index == 1:
        with torch.no_grad():
            other.model.layers[0].self_attn.q_proj.weight += 1
            other.model.layers[1].self_attn.q_proj.weight += 1
            other.model.layers[2].self_attn.q_proj.weight += 1
            other.model.layers[3].self_attn.q_proj.weight += 1
    refused("different", model=other)
    return said


def main(base: Path, output: Path) -> None:
    fsdp_on_cpu.enable()
    rank = PartialState(cpu=True).process_index  # joins the other process
    seen = {name: [train(name, base, output, replicate) for replicate in (False, True)] for name in PAIRS}
    (output / f"seen-{rank}.json").write_text(json.dumps({"seen": seen, "said": refusals(base, output)}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
    leave()
