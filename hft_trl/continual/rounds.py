"""What each round learns, from which model, and which tasks it is judged by: the approaches that differ in data alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hft_trl.continual.tasks import Row, Task

APPROACHES = ("sequential", "replay", "lora", "o_lora", "multitask", "individual")
ADAPTERS = ("lora", "o_lora")
"""Approaches that learn an adapter, so there is no half of the model to draw."""


@dataclass(frozen=True)
class Round:
    """
    One training of an approach.

    Attributes:
        name (`str`): Name of its folder.
        tasks (`tuple[int, ...]`): Numbers of the tasks that it is there to learn.
        evaluated (`tuple[int, ...]`): Numbers of the tasks that its model is asked afterwards.
        rows (`tuple[Row, ...]`): What it learns from.
        epochs (`int`): Passes over the rows.
        start (`str`, *optional*): Name of the round whose model it starts from, `None` for the base.
    """

    name: str
    tasks: tuple[int, ...]
    evaluated: tuple[int, ...]
    rows: tuple[Row, ...]
    epochs: int
    start: str | None


def plan_rounds(
    approach: str, tasks: Sequence[Task], general: Sequence[Row] = (), replay_share: float = 0.1, seed: int = 42
) -> list[Round]:
    """
    The rounds of an approach.

    Args:
        approach (`str`):
            One of [`APPROACHES`]. `"sequential"` learns one task after the other, each from the last one's model.
            `"replay"` does, with a share of each earlier task's rows and all general rows mixed in. `"lora"` and
            `"o_lora"` learn the rows of sequential, in one adapter or in one per round. `"multitask"` learns
            all tasks in one round, in which each row comes as often as its task has epochs. `"individual"` learns each
            task from the base.
        tasks (`Sequence[Task]`):
            The tasks in order.
        general (`Sequence[Row]`, *optional*):
            General alignment data for replay.
        replay_share (`float`, *optional*, defaults to `0.1`):
            Share of the rows of each earlier task that replay mixes in (the paper's 10 %).
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draw of these rows, which is another one in every round.

    Returns:
        `list[Round]`: The rounds, each after the one it starts from.
    """
    if approach == "multitask":
        pooled = tuple(row for task in tasks for row in task.train * task.epochs)
        everything = tuple(range(len(tasks)))
        return [Round("round-1", everything, everything, pooled, 1, None)]
    rounds: list[Round] = []
    for number, task in enumerate(tasks):
        rows, evaluated, start = task.train, tuple(range(number + 1)), rounds[-1].name if rounds else None
        if approach == "individual":
            evaluated, start = (number,), None
        if approach == "replay":
            earlier = [_share(other, replay_share, f"{seed} {number} {other.name}") for other in tasks[:number]]
            rows = (*rows, *(row for drawn in earlier for row in drawn), *general)
        rounds.append(Round(f"round-{number + 1}", (number,), evaluated, rows, task.epochs, start))
    return rounds


def _share(task: Task, share: float, seed: str) -> list[Row]:
    return random.Random(seed).sample(task.train, max(1, round(share * len(task.train))))
