"""Plan, train and evaluate the rounds of each approach."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from hft_trl.checkpoints.resumable import ResumableMixin
from hft_trl.continual.answers import Answered, evaluate_tasks
from hft_trl.continual.continual_arguments import ADAPTER_FOLDER, Adapter, Approach
from hft_trl.continual.tasks import Row, Task, encode
from hft_trl.recipe import Stage
from hft_trl.report import StageRecord
from hft_trl.saved_models.digests import content_digest

WITHOUT_TRANSFER = ("multitask", "individual")
"""Approaches in which no task is learned after another one in the same model, so that none can be forgotten."""


@dataclass(frozen=True)
class RoundPlan:
    """Describe the rows that a round trains on and the tasks that it is evaluated on."""

    name: str  # name of its folder
    tasks: tuple[Task, ...]  # tasks that it learns
    evaluated: tuple[Task, ...]  # tasks whose test sets its model answers
    rows: tuple[Row, ...]
    epochs: int
    start: str | None  # name of the round whose model it starts from, None for the base
    memories: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)  # GEM's, by name of the earlier task


def plan_rounds(
    approach: Approach,
    tasks: Sequence[Task],
    general: Sequence[Row] = (),
    replay_share: float = 0.1,
    seed: int = 42,
    gem_memory: int = 64,
) -> list[RoundPlan]:
    """
    Plan the rounds of an approach, each after the round that it starts from.

    `sequential`, `gem` and `replay` learn each task from the previous round's model: gem with a memory of each earlier
    task ([`~hft_trl.continual.gem.GEMTrainer`]), replay with a share of their rows and all general rows. `lora` and
    `o_lora` train one adapter or one per round. `multitask` learns all tasks in one round, with rows repeated by their
    task's epochs, and `individual` learns each task from the base.
    """
    if approach == "multitask":
        pooled = tuple(row for task in tasks for row in task.train * task.epochs)
        return [RoundPlan("round-1", tuple(tasks), tuple(tasks), pooled, 1, None)]
    rounds: list[RoundPlan] = []
    for number, task in enumerate(tasks):
        earlier, rows, memories = tasks[:number], task.train, {}
        evaluated, start = (*earlier, task), rounds[-1].name if rounds else None
        if approach == "individual":
            evaluated, start = (task,), None
        elif approach == "gem":
            memories = {other.name: _draw(other, gem_memory, f"{seed} memory {other.name}") for other in earlier}
        elif approach == "replay":
            for other in earlier if replay_share > 0 else ():
                count = max(1, round(replay_share * len(other.train)))
                rows = (*rows, *_draw(other, count, f"{seed} {number} {other.name}"))
            rows = (*rows, *general)
        rounds.append(RoundPlan(f"round-{number + 1}", (task,), evaluated, rows, task.epochs, start, memories))
    return rounds


def _draw(task: Task, rows: int, seed: str) -> tuple[Row, ...]:
    return tuple(random.Random(seed).sample(task.train, min(rows, len(task.train))))


@dataclass
class Round(Stage):
    """Store a round as a stage. `load_data` sets `memories` (GEM's) and `truncated_rows`."""

    plan: RoundPlan | None = None
    max_length: int | None = None  # in tokens, of prompt and answer
    adapter: Adapter | None = None
    memory: Path | None = None  # file with the rows of GEM's memories
    memories: list[Dataset] = field(default_factory=list)
    truncated_rows: int = 0

    def check(self) -> None:
        """Check the start model, and the adapter if the round trains one."""
        super().check()
        if self.adapter is not None:
            from hft_trl.continual.adapters import check_adapter  # needs peft

            check_adapter(self.model, self.args, self.adapter)

    def sources(self) -> set[Path]:
        """Return the folders of the earlier rounds that it starts from."""
        return super().sources() | set(self.adapter.folders if self.adapter is not None else ())

    def saved_weights(self) -> list[Path]:
        """Return the files with the weights of the finished round."""
        adapter = [] if self.adapter is None else [self.folder / ADAPTER_FOLDER / ADAPTER_SAFE_WEIGHTS_NAME]
        return super().saved_weights() + adapter

    def own_settings(self) -> dict[str, dict[str, Any]]:
        """Return the settings of the adapter, and a digest of GEM's memories."""
        lora = {} if self.adapter is None else {"lora": self.adapter.settings(self.folder)}
        data = {} if self.memory is None else {"data": {"memory": content_digest(self.memory)}}
        return lora | data

    def load_data(self) -> None:
        """Encode the rows and the memories, unless this was done before."""
        if self.train_dataset is None:
            tokenizer, processes = self.load_tokenizer(), self.args.dataset_num_proc
            self.train_dataset, self.truncated_rows = encode(self.plan.rows, tokenizer, self.max_length, processes)
            self.memories = [encode(rows, tokenizer, self.max_length)[0] for rows in self.plan.memories.values()]

    def train(self, trainer: ResumableMixin) -> StageRecord:
        """Train as every stage does, note how many rows were truncated, and free the data."""
        record = super().train(trainer, truncated_rows=self.truncated_rows)
        self.train_dataset, self.memories = None, []
        return record

    def evaluate(self, max_new_tokens: int, batch_size: int) -> dict[str, Answered]:
        """Score the round's model on the tasks of its plan. All processes must call it."""
        return evaluate_tasks(
            self.folder,
            self.plan.evaluated,
            max_new_tokens,
            self.max_length,
            batch_size,
            dtype=self.model.dtype,
            trust_remote_code=self.model.trust_remote_code,
            attn_implementation=self.model.attn_implementation,
        )
