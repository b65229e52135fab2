"""
Trainings that are run as one process, as several, and on several machines, and what every process saw of them.

As a program it runs the trainings of a file: `accelerate launch ... train.py BASE OUTPUT NAME [NAME ...]`.
"""

import json
import os
import sys
from pathlib import Path

import fsdp_on_cpu
import torch
import torch.distributed as dist
from accelerate import PartialState
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl import DPOConfig, SFTConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import tulu_row, ultrafeedback_row
from leaving import leave
from training import ResumableDPOTrainer, ResumableSFTTrainer

from hft_trl import HFTConfig
from hft_trl.chat import load_tokenizer
from hft_trl.config import STORAGE
from hft_trl.recipe.rows import preference_dataset, sft_dataset
from hft_trl.reference import memory
from hft_trl.weights import named_parameters

GLOBAL_BATCH = 8
STEPS = 4
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_steps": 2,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
}
# Name of a training: its stage, and what differs from the plain one. "-resumed" goes on from that one's second step.
TRAININGS = {
    "sft": {},
    "sft-resumed": {},
    "sft-checkpointing": {"gradient_checkpointing": True},
    "sft-sharded": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    "sft-sharded-resumed": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    "sft-mixed": {"bf16": True, "frozen_dtype": "bfloat16"},
    "sft-mixed-resumed": {"bf16": True, "frozen_dtype": "bfloat16"},
    "sft-sharded-mixed": {
        **{"bf16": True, "frozen_dtype": "bfloat16"},
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    },
    "dpo": {},
    "dpo-mixed": {"bf16": True, "frozen_dtype": "bfloat16"},
    "dpo-resumed": {},
    "dpo-sharded": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    "dpo-sharded-resumed": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    "dpo-sharded-mixed": {
        **{"bf16": True, "frozen_dtype": "bfloat16"},
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    },
    "sft-replicated": {"replicate_frozen": True},
    "sft-replicated-resumed": {"replicate_frozen": True},
    "sft-checkpointing-replicated": {"replicate_frozen": True, "gradient_checkpointing": True},
    "sft-mixed-replicated": {"replicate_frozen": True, "bf16": True, "frozen_dtype": "bfloat16"},
    "sft-sharded-replicated": {"replicate_frozen": True, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    "sft-sharded-replicated-resumed": {"replicate_frozen": True, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    "dpo-replicated": {"replicate_frozen": True},
    "dpo-replicated-resumed": {"replicate_frozen": True},
    "dpo-mixed-replicated": {"replicate_frozen": True, "bf16": True, "frozen_dtype": "bfloat16"},
    # four micro-batches of one row: their gradients wait whole in every process, or are divided after each
    "sft-accumulated-mixed": {"bf16": True, "frozen_dtype": "bfloat16", "gradient_accumulation_steps": 4},
    "sft-accumulated-synced": {
        "gradient_accumulation_steps": 4,
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    },
    # names of parameters get parts of their own from FSDP's wrappers and from torch.compile
    "sft-wrapped": {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
    "dpo-wrapped": {"FSDP_ACTIVATION_CHECKPOINTING": "true", "torch_compile": True, "torch_compile_backend": "eager"},
    "dpo-wrapped-resumed": {
        **{"FSDP_ACTIVATION_CHECKPOINTING": "true", "torch_compile": True, "torch_compile_backend": "eager"},
    },
    "dpo-compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "dpo-precomputed": {"precompute_ref_log_probs": True},  # the rows are in memory: in no file that processes share
}


class Witness(TrainerCallback):
    """What a process sees of the gradients, and of FSDP's collective operations."""

    def __init__(self) -> None:
        self.with_gradient: set[str] = set()
        self.reduced = self.gathered = self.gathered_by_reference = 0
        self.in_reference = False
        self.waiting_whole = self.waiting_sharded = 0  # bytes of gradients between micro-batches

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        # Modules that are gathered together share one account
        states = {id(state): state for state in map(fsdp_state, model.modules()) if state is not None}
        parameters = [p for state in states.values() for group in state._fsdp_param_groups for p in group.fsdp_params]
        # From torch 2.15 on, the first is the second
        held = {id(grad): grad for p in parameters for grad in (p.unsharded_accumulated_grad, p.unsharded_param.grad)}
        self.waiting_whole = max(self.waiting_whole, sum(grad.nbytes for grad in held.values() if grad is not None))
        sharded = [p.grad.to_local().nbytes for p in model.parameters() if isinstance(p.grad, DTensor)]
        self.waiting_sharded = max(self.waiting_sharded, sum(sharded))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.with_gradient |= {name for name, p in named_parameters(model) if p.grad is not None}

    def listen(self, reference: torch.nn.Module | None) -> None:
        gather, scatter = dist.all_gather_single, dist.reduce_scatter_single

        def all_gather_single(output, *args, **kwargs):
            self.gathered += output.nbytes
            if self.in_reference:
                self.gathered_by_reference = max(self.gathered_by_reference, output.nbytes)
            return gather(output, *args, **kwargs)

        def reduce_scatter_single(output, input, *args, **kwargs):
            self.reduced += input.numel()
            return scatter(output, input, *args, **kwargs)

        dist.all_gather_single, dist.reduce_scatter_single = all_gather_single, reduce_scatter_single
        if reference is not None:
            reference.register_forward_pre_hook(lambda *_: setattr(self, "in_reference", True), prepend=True)
            reference.register_forward_hook(lambda *_: setattr(self, "in_reference", False), always_call=True)


def fsdp_state(module: torch.nn.Module):
    """FSDP2's own account of the parameters that it gathers for a module."""
    return module._get_fsdp_state() if isinstance(module, FSDPModule) else None


def train(name: str, base: Path, output: Path) -> dict:
    """Run one of the trainings and tell what this process saw."""
    stage, *variant = name.split("-")
    settings = dict(TRAININGS[name])
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for key, default in (("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT"), ("FSDP_ACTIVATION_CHECKPOINTING", "false")):
        value = settings.pop(key, default)
        if dist.is_initialized():  # the test's own process keeps its environment
            os.environ[key] = value
    hft_config = HFTConfig(**{key: settings.pop(key) for key in STORAGE if key in settings})
    settings["per_device_train_batch_size"] = (
        GLOBAL_BATCH // processes // settings.get("gradient_accumulation_steps", 1)
    )
    rows = Dataset.from_list([(tulu_row if stage == "sft" else ultrafeedback_row)(n) for n in range(32)])
    config, kind = (SFTConfig, ResumableSFTTrainer) if stage == "sft" else (DPOConfig, ResumableDPOTrainer)
    if stage == "sft":
        settings["assistant_only_loss"] = True
    trainer = kind(
        model=str(base),
        args=config(str(output / name), **{**SETTINGS, **settings}),
        train_dataset=(sft_dataset if stage == "sft" else preference_dataset)(rows, "rows"),
        processing_class=load_tokenizer(str(base), "tulu"),
        hft_config=hft_config,
    )
    whole = sum(p.nbytes for p in trainer.model.parameters())  # before it is sharded
    reference = trainer.ref_model if stage == "dpo" else None  # none where its log-probs were computed before
    witness = Witness()
    trainer.add_callback(witness)
    if dist.is_initialized():
        witness.listen(reference)
    checkpoint = None
    if "resumed" in variant:
        checkpoint = str(output / name.removesuffix("-resumed") / f"checkpoint-{STEPS // 2}")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()

    named = dict(named_parameters(trainer.model))
    held = {id(p) for p in trainer.optimizer.state}
    ddp = trainer.model_wrapped._get_ddp_logging_data() if processes > 1 and not trainer.is_fsdp_enabled else {}
    return {
        "processes": trainer.accelerator.num_processes,
        "backend": trainer.accelerator.distributed_type.value,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "trainable": sorted(trainer.hft_selection.trainable),
        "digest": trainer.hft_selection.digest,
        "with_gradient": sorted(witness.with_gradient),
        "with_optimizer_state": sorted(n for n, p in named.items() if id(p) in held),
        "bytes": whole,
        "trainable_numbers": sum(p.numel() for p in named.values() if p.requires_grad),
        "ddp_bytes": ddp.get("total_parameter_size_bytes"),
        "reduced_numbers": witness.reduced,
        "waiting_whole": witness.waiting_whole,
        "waiting_sharded": witness.waiting_sharded,
        "gathered_bytes": witness.gathered,
        "gathered_by_reference": witness.gathered_by_reference,
        "largest_layer": max(sum(p.nbytes for p in layer.parameters()) for layer in trainer.model.model.layers),
        "embedding": trainer.model.get_input_embeddings().weight.nbytes,
        "parts": [
            sum(isinstance(m, FSDPModule) for m in x.modules()) if x is not None else 0
            for x in (trainer.model, reference)
        ],
        "shared_reference_bytes": shared_with_policy(trainer) if reference is not None else None,
        "frozen_bytes": sum(p.nbytes for p in named.values() if not p.requires_grad),
        "frozen_parameters": sum(not p.requires_grad for p in named.values()),
        "whole": sorted(name for name, p in named.items() if not isinstance(p, DTensor)),
        "reference_is_sharded": reference is not None and all(isinstance(p, DTensor) for p in reference.parameters()),
    }


def shared_with_policy(trainer: ResumableDPOTrainer) -> int:
    """Bytes that the reference stores in the policy's memory, once both are where they are trained."""
    return memory(*(trainer.accelerator.unwrap_model(model) for model in (trainer.model, trainer.ref_model)))[1]


def main(base: str, output: str, *names: str) -> None:
    fsdp_on_cpu.enable()
    PartialState()  # joins the other processes
    for name in names:
        seen = train(name, Path(base), Path(output))
        file = Path(output) / name / f"seen-{PartialState().process_index}.json"
        file.write_text(json.dumps(seen, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    leave()
