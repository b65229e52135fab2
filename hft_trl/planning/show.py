"""Plans as a table, as JSON and as files for a recipe, and what would help if a model does not fit."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import yaml

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.files import check_output, replacing, resolved, write_text, writing
from hft_trl.planning.fit import RESERVED, Plan, Planner
from hft_trl.planning.memory import Task
from hft_trl.report.tables import Grid

PARTS = {
    "weights_trainable": "trainable weights",
    "weights_frozen": "frozen weights",
    "reference": "reference model",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "weight_copies": "bfloat16 copies of weights",
    "activations": "activations",
    "logits": "tiles of logits",
    "communication": "communication buffers",
}
OPTIONAL = ("reference", "weight_copies", "communication")
OPTIONS = ("train_embeddings", "frozen_dtype", "frozen_quantization", "optimizer_in_backward", "replicate_frozen")
OF_FROZEN_HALF = ("frozen_dtype", "frozen_quantization", "replicate_frozen")
DATA = {
    "sft": {"dataset": "allenai/tulu-v2-sft-mixture", "split": "train"},
    "dpo": {"dataset": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_prefs", "drop_equal_pairs": True},
}
DEMO = {"sft": {"dataset": "demo", "split": "train"}, "dpo": {"dataset": "demo", "split": "train_prefs"}}
SCHEDULE = {
    "sft": {"num_train_epochs": 2, "learning_rate": 2e-5, "warmup_steps": 0.03},
    "dpo": {"num_train_epochs": 1, "learning_rate": 5e-7, "warmup_steps": 0.1, "beta": 0.1},
}


def memory_grid(plans: list[Plan]) -> Grid:
    rows = [
        [text, *(f"{plan.memory[part] / 1e9:,.1f}" for plan in plans)]
        for part, text in PARTS.items()
        if part not in OPTIONAL or any(plan.memory[part] for plan in plans)
    ]
    total = len(rows)
    rows += [
        [f"total, of {plans[0].available / 1e9:,.1f}", *(f"{plan.total / 1e9:,.1f}" for plan in plans)],
        ["fits", *("yes" if plan.fits else "no" for plan in plans)],
        ["launch configuration", *(plan.layout for plan in plans)],
        ["micro-batch x accumulation", *(f"{plan.micro_batch} x {plan.accumulation}" for plan in plans)],
        ["activation checkpointing", *(plan.checkpointing for plan in plans)],
        ["saved for backward", *(f"{plan.saved / 1e9:,.1f}" for plan in plans)],
        ["petaFLOP per step", *(f"{plan.operations / 1e15:.3g}" for plan in plans)],
    ]
    if any(plan.sync_each_batch for plan in plans):
        rows.append(["sync_each_batch", *("yes" if plan.sync_each_batch else "no" for plan in plans)])
    return Grid("", ["GB on each GPU", *(plan.method.upper() for plan in plans)], rows, frozenset({total}))


def heading(model: str, task: Task) -> str:
    machine = f"{task.gpus} GPU{'s' if task.gpus > 1 else ''} of {task.gpu_memory / 1e9:g} GB"
    return f"{model}: {task.stage.upper()}, {task.sequence_length} tokens, batch {task.global_batch}, {machine}"


def task_json(model: str, task: Task) -> dict[str, Any]:
    names = ("stage", "gpus", "gpu_memory", "sequence_length", "global_batch")
    return {"model": model, **{name: vars(task)[name] for name in names}, "reserved": RESERVED, **vars(task.storage)}


def plan_json(plan: Plan, helps: list[tuple[str, Plan]]) -> dict[str, Any]:
    """Return a plan and what would help if it does not fit, with memory in bytes."""
    return {
        "fits": plan.fits,
        "accelerate_config": plan.layout,
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "sync_each_batch": plan.sync_each_batch,
        "activation_checkpointing": "selective" if plan.checkpointed > 1 else plan.checkpointing,
        "every_n_layers": plan.checkpointed or None,
        "memory": plan.memory,
        "total": plan.total,
        "missing": max(plan.total - plan.available, 0),
        "left": max(plan.left, 0.0),
        "saved_for_backward": plan.saved,
        "operations": plan.operations,
        "helps": [
            {"flags": flags, "fits": other.fits, "total": other.total, "sync_each_batch": other.sync_each_batch}
            for flags, other in helps
        ],
    }


def what_helps(planner: Planner, task: Task, plan: Plan) -> list[tuple[str, Plan]]:
    """Return `hft-trl plan` flags that save memory, each with its smallest plan, fitting or not."""
    storage, half = task.storage, planner.method == "hft"
    frozen, eight, nf4 = {"frozen_dtype": "bfloat16"}, {"optim": "adamw_bnb_8bit"}, {"frozen_quantization": "nf4"}
    # Without accumulation, all rows of a step are on the GPU at once
    found = _smaller_batch(planner, task, {}) if storage.optimizer_in_backward else []
    changes: list[dict[str, Any]] = []
    if plan.layout in ("single", "ddp"):
        changes = [eight]
        if half and storage.frozen_quantization is None:
            changes += [frozen, {**frozen, **eight}, *([] if storage.frozen_dtype else [{**nf4, **eight}])]
    for change in changes:
        other = dataclasses.replace(task, storage=dataclasses.replace(storage, **change), layouts=(plan.layout,))
        smaller = planner.smallest(other, plan.layout)
        if smaller.total not in (plan.total, *(known.total for _, known in found)):  # else a flag saves nothing
            found.append((_flags(change), smaller))
    if any(other.fits for _, other in found):
        return found
    if half and task.gpus == 1:
        narrow = {} if planner.rounds("bfloat16") else {"dtype": "bfloat16"}
        same_type = dataclasses.replace(task, storage=dataclasses.replace(storage, frozen_dtype=None))
        found += _smaller_batch(planner, same_type, {**narrow, **eight, **nf4, "optimizer_in_backward": True})
    if storage.in_eight_bits or storage.frozen_quantization or storage.optimizer_in_backward:
        return found  # these are not sharded
    for gpus in (2, 4, 8, 16, 32, 64, 128):
        if gpus > task.gpus and task.global_batch % gpus == 0:
            more = dataclasses.replace(task, gpus=gpus, layouts=("fsdp2",))
            other = planner.one(more, "fsdp2", 1, 1, sync_each_batch=True)
            if other.fits:
                return [*found, (f"--gpus {gpus}", other)]
    return found


def _flags(change: dict[str, Any]) -> str:
    flags = (f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in change.items())
    return " ".join(flags)


def _smaller_batch(planner: Planner, task: Task, change: dict[str, Any]) -> list[tuple[str, Plan]]:
    """Return the largest smaller global batch (1, 2, 4 ... rows) that fits one GPU without accumulation."""
    storage = dataclasses.replace(task.storage, **change)
    found: list[tuple[str, Plan]] = []
    size = 1
    while size < task.global_batch:
        other = dataclasses.replace(task, global_batch=size, storage=storage)
        plan = planner.one(other, "single", size, 1)
        if not plan.fits:
            break
        found = [(_flags({**change, "global_batch": size}), plan)]
        size *= 2
    return found


def launch_line(plan: Plan, gpus: int, recipe: str) -> str:
    """Return the command that starts a recipe. On several machines it runs once on each."""
    machines = max(gpus // 8, 1)
    name = plan.layout if machines == 1 else f"{plan.layout}_multi_node"
    words = [f"accelerate launch --config_file accelerate_configs/{name}.yaml"]
    if gpus > 1:
        words.append(f"--num_processes {gpus}")
    if machines > 1:
        where = '--machine_rank "${MACHINE_RANK:-0}" --main_process_ip "${MAIN_PROCESS_IP:-127.0.0.1}"'
        words.append(f"--num_machines {machines} {where}")
    return " ".join([*words, "recipes/sft_then_dpo.py --config", shlex.quote(recipe)])


def new_files(folder: str) -> tuple[Path, Path]:
    """Return the files that [`write`] makes in a folder. Reject those that exist or cannot be written."""
    files = resolved(folder) / "recipe.yaml", resolved(folder) / "launch.sh"
    for path in files:
        if path.exists():
            raise HFTError(f"--write: {str(path)!r} exists: choose another folder, or remove the file.")
    check_output("--write", folder)
    return files


def write(
    folder: str,
    model: str,
    hft: HFTConfig,
    stages: dict[str, tuple[Task, Plan]],
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Path, Path]:
    """Write `recipe.yaml` and `launch.sh` for a task and a plan of each stage, with absolute paths."""
    for name, (_, plan) in stages.items():
        if not plan.fits:
            raise HFTError(
                f"--write: {name} does not fit, {(plan.total - plan.available) / 1e9:.1f} GB are missing on each GPU: "
                f"--stage {name} without --write shows what would help."
            )
    recipe, launch = new_files(folder)
    task, plan = stages["sft"]
    line = launch_line(plan, task.gpus, str(recipe))
    source = {"model_name_or_path": model if model == "demo" or not Path(model).is_dir() else str(resolved(model))}
    if revision:
        source["model_revision"] = revision
    if trust_remote_code:
        source["trust_remote_code"] = True
    options = {name: getattr(hft, name) for name in OPTIONS if hft.method == "hft" or name not in OF_FROZEN_HALF}
    changed = {name: value for name, value in options.items() if value != getattr(HFTConfig, name)}
    text = f"# Planned by `hft-trl plan`: {task.gpus} x {task.gpu_memory / 1e9:g} GB, {plan.layout}. "
    text += f"Computed, not measured.\n# Launch:   {line}\n# warmup_steps is a share of all steps.\n\n"
    text += _dump({"model": {**source, "dtype": task.storage.dtype}})
    text += _dump({"output_dir": str(recipe.parent / "run"), "method": hft.method})
    text += _dump({"hft": {"ratio": hft.ratio, "strategy": hft.strategy, "seed": hft.seed, **changed}})
    for name in ("sft", "dpo"):
        task, plan = stages[name]
        text += f"# Global batch {task.global_batch} = {task.gpus} x {plan.micro_batch} x {plan.accumulation}. "
        text += f"About {plan.total / 1e9:.1f} of {plan.available / 1e9:.1f} GB on each GPU.\n"
        data = (DEMO if model == "demo" else DATA)[name]
        text += _dump({name: {**data, **SCHEDULE[name], **_arguments(task, plan)}})
    with writing(folder, resumes=False):
        write_text(recipe, text.rstrip("\n") + "\n")
        with replacing(launch) as new:
            script = f"#!/usr/bin/env bash\n# From the root of the repository.\nset -euo pipefail\n{line}\n"
            new.write_text(script, encoding="utf-8")
            new.chmod(0o755)
    return recipe, launch


def _dump(section: dict[str, Any]) -> str:
    return yaml.safe_dump(section, sort_keys=False, allow_unicode=True, width=1000) + "\n"


def _arguments(task: Task, plan: Plan) -> dict[str, Any]:
    arguments = {
        "lr_scheduler_type": "linear",
        "max_length": task.sequence_length,
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "bf16": True,
        "gradient_checkpointing": plan.checkpointed > 0,
        "optim": task.storage.optim,
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
        "seed": 42,
    }
    if plan.checkpointed > 1:
        arguments["gradient_checkpointing_kwargs"] = {"every_n_layers": plan.checkpointed}
    if plan.sync_each_batch:
        arguments["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    if task.storage.optimizer_in_backward:
        arguments["max_grad_norm"] = 0
    return arguments
