"""What would help where a model does not fit."""

import dataclasses

from hft_trl.planning.fit import Plan, Planner
from hft_trl.planning.task import Task


def what_helps(planner: Planner, task: Task, plan: Plan) -> list[tuple[str, Plan]]:
    """
    Other ways for a model that doesn't fit, from the ones that need no other machine on.

    Args:
        planner ([`Planner`]):
            The planner.
        task ([`Task`]):
            What doesn't fit.
        plan ([`Plan`]):
            Its smallest plan.

    Returns:
        `list[tuple[str, Plan]]`: Flags of `hft-trl plan`, and the smallest plan with them, whether it fits or not.
    """
    found: list[tuple[str, Plan]] = []
    if task.storage.optimizer_in_backward:  # all rows of a step are there at once
        found += _smaller_batch(planner, task, "")
    if plan.layout in ("single", "ddp"):
        rounds = planner.method == "hft" and task.storage.frozen_quantization is None
        frozen = {"frozen_dtype": "bfloat16"} if rounds else {}
        packed = {"frozen_quantization": "nf4"} if rounds and task.storage.frozen_dtype is None else {}
        eight = {"optim": "adamw_bnb_8bit"}
        for change in (eight, frozen, {**frozen, **eight}, {**packed, **eight} if packed else {}):
            flags = _flags(change)
            if change and flags not in dict(found) and any(vars(task.storage)[k] != v for k, v in change.items()):
                other = dataclasses.replace(
                    task, storage=dataclasses.replace(task.storage, **change), layouts=(plan.layout,)
                )
                found.append((flags, planner.one(other, plan.layout, plan.micro_batch, 1)))
    fits = any(other.fits for _, other in found)
    if planner.method == "hft" and task.gpus == 1 and not fits:
        smallest = {"optim": "adamw_bnb_8bit", "frozen_quantization": "nf4"}
        if not planner.rounds("bfloat16"):
            smallest = {"dtype": "bfloat16", **smallest}
        storage = dataclasses.replace(task.storage, **smallest, frozen_dtype=None, optimizer_in_backward=True)
        flags = f"{_flags(smallest)} --optimizer-in-backward"
        found += _smaller_batch(planner, dataclasses.replace(task, storage=storage), flags)
    alone = task.storage.in_eight_bits or task.storage.frozen_quantization or task.storage.optimizer_in_backward
    if not alone and not fits:
        for gpus in (2, 4, 8, 16, 32, 64, 128):
            if gpus > task.gpus and task.global_batch % gpus == 0:
                more = dataclasses.replace(task, gpus=gpus, layouts=("fsdp2",))
                other = planner.one(more, "fsdp2", 1, 1, sync_each_batch=True)
                if other.fits:
                    found.append((f"--gpus {gpus}", other))
                    break
    return found


def _flags(change: dict[str, str]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in change.items())


def _smaller_batch(planner: Planner, task: Task, flags: str) -> list[tuple[str, Plan]]:
    """The largest of 1, 2, 4 ... rows that fits one GPU in one piece, if it is less than the batch."""
    found: list[tuple[str, Plan]] = []
    size = 1
    while size < task.global_batch:
        plan = planner.one(dataclasses.replace(task, global_batch=size), "single", size, 1)
        if not plan.fits:
            break
        found = [(f"{flags} --global-batch {size}".strip(), plan)]
        size *= 2
    return found
