"""Plans as a table and as JSON, and what would help if a model does not fit."""

import dataclasses
from typing import Any

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


def memory_grid(plans: list[Plan]) -> Grid:
    """Return a table of memory by part and settings, with a column per plan."""
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
    return {
        "model": model,
        **{name: getattr(task, name) for name in names},
        "reserved": RESERVED,
        **vars(task.storage),
    }


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
        changed = dataclasses.replace(storage, **change)
        if changed != storage:
            other = dataclasses.replace(task, storage=changed, layouts=(plan.layout,))
            found.append((_flags(change), planner.one(other, plan.layout, plan.micro_batch, 1)))
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
