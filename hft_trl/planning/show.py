"""Plans as a table and as JSON."""

from typing import Any

from hft_trl.planning.fit import RESERVED, Plan
from hft_trl.planning.task import Task
from hft_trl.report.tables import Grid

PARTS = {
    "weights_trainable": "weights that learn",
    "weights_frozen": "frozen weights",
    "reference": "reference",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "weight_copies": "bfloat16 copies of weights",
    "activations": "activations",
    "logits": "tiles of logits",
    "communication": "the backend's buffers",
}
OPTIONAL = ("reference", "weight_copies", "communication")
CHECKPOINTING = {0: "none", 1: "full"}


def checkpointing(plan: Plan) -> str:
    """Which layers are computed again, in words."""
    return CHECKPOINTING.get(plan.checkpointed, f"every {plan.checkpointed} layers")


def memory_grid(plans: list[Plan]) -> Grid:
    """
    Memory by part, and the settings, a column for each plan.

    Args:
        plans (`list[Plan]`):
            The plans.
    """
    rows = [
        [text, *(f"{plan.memory[part] / 1e9:,.1f}" for plan in plans)]
        for part, text in PARTS.items()
        if part not in OPTIONAL or any(plan.memory[part] for plan in plans)
    ]
    rows.append([f"together, of {plans[0].available / 1e9:,.1f}", *(f"{plan.total / 1e9:,.1f}" for plan in plans)])
    closing = len(rows) - 1
    rows += [
        ["fits", *("yes" if plan.fits else "no" for plan in plans)],
        ["launch configuration", *(plan.layout for plan in plans)],
        ["micro-batch x accumulation", *(f"{plan.micro_batch} x {plan.accumulation}" for plan in plans)],
        ["activation checkpointing", *(checkpointing(plan) for plan in plans)],
        ["kept for backward", *(f"{plan.saved / 1e9:,.1f}" for plan in plans)],
        ["petaflop in a step", *(f"{plan.operations / 1e15:.3g}" for plan in plans)],
    ]
    if any(plan.sync_each_batch for plan in plans):
        rows.append(["sync_each_batch", *("yes" if plan.sync_each_batch else "no" for plan in plans)])
    return Grid("", ["GB on each GPU", *(plan.method.upper() for plan in plans)], rows, frozenset({closing}))


def heading(model: str, task: Task) -> str:
    """What was asked for, in a line."""
    machine = f"{task.gpus} GPU{'s' if task.gpus > 1 else ''} of {task.gpu_memory / 1e9:g} GB"
    return f"{model}: {task.stage.upper()}, {task.sequence_length} tokens, batch {task.global_batch}, {machine}"


def plan_json(plan: Plan, helps: list[tuple[str, Plan]]) -> dict[str, Any]:
    """A plan with every figure in bytes, and what would help where it doesn't fit."""
    return {
        "fits": plan.fits,
        "accelerate_config": plan.layout,
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "sync_each_batch": plan.sync_each_batch,
        "activation_checkpointing": CHECKPOINTING.get(plan.checkpointed, "selective"),
        "every_n_layers": plan.checkpointed or None,
        "memory": plan.memory,
        "total": plan.total,
        "missing": max(plan.total - plan.available, 0),
        "saved_for_backward": plan.saved,
        "operations": plan.operations,
        "helps": [
            {"flags": flags, "fits": other.fits, "total": other.total, "sync_each_batch": other.sync_each_batch}
            for flags, other in helps
        ],
    }


def task_json(model: str, task: Task) -> dict[str, Any]:
    """What was asked for."""
    return {
        "model": model,
        "stage": task.stage,
        "gpus": task.gpus,
        "gpu_memory": task.gpu_memory,
        "reserved": RESERVED,
        "sequence_length": task.sequence_length,
        "global_batch": task.global_batch,
        **vars(task.storage),
    }
