"""What each round learns, from which model, and which tasks it is judged by: the approaches that differ in data alone."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hft_trl.continual.tasks import Row, Task

Approach = Literal["sequential", "gem", "replay", "lora", "o_lora", "multitask", "individual"]
ADAPTERS = ("lora", "o_lora")
"""Approaches that learn an adapter, so there is no half of the model to draw."""
WITHOUT_TRANSFER = ("multitask", "individual")
"""Approaches in which no task comes after another one in the same model, so that none can be forgotten."""


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
        memories (`Mapping[str, tuple[Row, ...]]`): Rows of earlier tasks, by name, that GEM keeps it from unlearning.
    """

    name: str
    tasks: tuple[int, ...]
    evaluated: tuple[int, ...]
    rows: tuple[Row, ...]
    epochs: int
    start: str | None
    memories: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)


def plan_rounds(
    approach: Approach,
    tasks: Sequence[Task],
    general: Sequence[Row] = (),
    replay_share: float = 0.1,
    seed: int = 42,
    gem_memory: int = 64,
) -> list[Round]:
    """
    The rounds of an approach.

    Args:
        approach (`Approach`):
            `"sequential"` learns one task after the other, each from the last one's model.
            `"gem"` does, and no step may raise the loss on a memory of each earlier task (see [`GEMTrainer`]).
            `"replay"` does, with a share of each earlier task's rows and all general rows mixed in. `"lora"` and
            `"o_lora"` learn the rows of sequential, in one adapter or in one per round. `"multitask"` learns
            all tasks in one round, in which each row comes as often as its task has epochs. `"individual"` learns each
            task from the base.
        tasks (`Sequence[Task]`):
            The tasks in order.
        general (`Sequence[Row]`, *optional*):
            General alignment data for replay.
        replay_share (`float`, *optional*, defaults to `0.1`):
            Share of the rows of each earlier task that replay mixes in (the paper's 10 %), at least one if it is not 0.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draws: of these rows another one in every round, of a task's memory one for all rounds.
        gem_memory (`int`, *optional*, defaults to `64`):
            Rows in GEM's memory of a task.

    Returns:
        `list[Round]`: The rounds, each after the one it starts from.
    """
    if approach == "multitask":
        pooled = tuple(row for task in tasks for row in task.train * task.epochs)
        everything = tuple(range(len(tasks)))
        return [Round("round-1", everything, everything, pooled, 1, None)]
    memories = {}
    if approach == "gem":
        memories = {task.name: _draw(task, gem_memory, f"{seed} memory {task.name}") for task in tasks}
    rounds: list[Round] = []
    for number, task in enumerate(tasks):
        rows, evaluated, start = task.train, tuple(range(number + 1)), rounds[-1].name if rounds else None
        if approach == "individual":
            evaluated, start = (number,), None
        if approach == "replay":
            earlier = [
                _draw(other, max(1, round(replay_share * len(other.train))), f"{seed} {number} {other.name}")
                for other in tasks[:number]
                if replay_share > 0
            ]
            rows = (*rows, *(row for drawn in earlier for row in drawn), *general)
        kept = {other.name: memories[other.name] for other in tasks[:number] if memories}
        rounds.append(Round(f"round-{number + 1}", (number,), evaluated, rows, task.epochs, start, kept))
    return rounds


def _draw(task: Task, rows: int, seed: str) -> tuple[Row, ...]:
    return tuple(random.Random(seed).sample(task.train, min(rows, len(task.train))))
