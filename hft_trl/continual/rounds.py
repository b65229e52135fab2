"""Plan, train and evaluate the rounds of each approach."""

import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from hft_trl.backends.zero import whole_models
from hft_trl.chat import complete
from hft_trl.checkpoints.resumable import ResumableMixin
from hft_trl.continual.continual_arguments import ADAPTER_FOLDER, Adapter, Approach
from hft_trl.continual.tasks import Row, Task, encode, encode_prompts, mean_score
from hft_trl.files import read_object, write_json_once, writing
from hft_trl.processes import by_first_process
from hft_trl.recipe import Stage
from hft_trl.report import StageRecord
from hft_trl.saved_models.digests import content_digest
from hft_trl.weights import check_readable, combined_digest

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


@dataclass(frozen=True)
class Answered:
    score: float  # of the task's metric, from 0 to 100
    empty: int  # predictions without any text, which score 0
    truncated: int  # prompts that were truncated from the left


def evaluate_tasks(
    folder: Path, tasks: Iterable[Task], max_new_tokens: int, max_length: int | None, batch_size: int, **loading: Any
) -> dict[str, Answered]:
    """
    Generate greedy answers to test sets, and return their scores by task.

    All processes must call it and share the work. Predictions are written to `predictions/<task>.json`, and reused for
    the same settings. In half precision, batch size and number of processes can change them. `max_length` counts the
    tokens of prompt and answer. `batch_size` is that of each process.
    """
    state, results, model, tokenizer = PartialState(), {}, None, None
    for task in tasks:
        path = folder / "predictions" / f"{task.name}.json"
        made_with = {
            "test_digest": combined_digest(task.test),
            "max_new_tokens": max_new_tokens,
            "max_length": max_length,
        }
        predictions, truncated = by_first_process(partial(_read, path, made_with))
        if predictions is None:
            if model is None:
                with whole_models():
                    model = AutoModelForCausalLM.from_pretrained(folder, **loading).to(state.device)
                trusted = loading.get("trust_remote_code", False)
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
            prompt_length = None if max_length is None else max_length - max_new_tokens
            rows, truncated = encode_prompts([row.prompt for row in task.test], tokenizer, prompt_length)
            with state.split_between_processes(rows) as ours:
                found = complete(model, tokenizer, ours, max_new_tokens, batch_size) if ours else []
                predictions = gather_object(found)
        results[task.name] = by_first_process(partial(_score, path, task, made_with, predictions, truncated))
    return results


def _read(path: Path, made_with: dict[str, Any]) -> tuple[list[str] | None, int]:
    """Read the predictions of [`_score`] for the same test set and settings, and the truncated prompts."""
    content: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        content = read_object(path, made_with=dict, predictions=list, result=dict)
    if content.get("made_with") != made_with:
        return None, 0
    return [row["prediction"] for row in content["predictions"]], content["result"]["truncated"]


def _score(path: Path, task: Task, made_with: dict[str, Any], predictions: Sequence[str], truncated: int) -> Answered:
    """Score predictions, and write them with the score unless the file contains the same."""
    answers = [row.answer for row in task.test]
    empty = sum(not text.strip() for text in predictions)
    result = Answered(mean_score(task.metric, predictions, answers), empty, truncated)
    content = {
        "task": task.name,
        "metric": task.metric,
        "result": asdict(result),
        "made_with": made_with,
        "predictions": [{"answer": a, "prediction": text} for a, text in zip(answers, predictions, strict=True)],
    }
    with writing(path):
        write_json_once(path, content)
    return result


@dataclass
class Round(Stage):
    """Store a round as a stage. `load_data` sets `memories` (GEM's) and `truncated_rows`."""

    section: ClassVar[str] = "sft"
    plan: RoundPlan | None = None
    max_length: int | None = None  # in tokens, of prompt and answer
    adapter: Adapter | None = None
    memory: Path | None = None  # file with the rows of GEM's memories
    memories: list[Dataset] = field(default_factory=list)

    def check(self) -> None:
        super().check()
        if self.adapter is not None:
            from hft_trl.continual.adapters import check_adapter  # needs peft

            check_adapter(self.model, self.args, self.adapter)

    def sources(self) -> set[Path]:
        return super().sources() | set(self.adapter.folders if self.adapter is not None else ())

    def check_saved(self) -> None:
        super().check_saved()
        if self.adapter is not None:
            check_readable([self.folder / ADAPTER_FOLDER / ADAPTER_SAFE_WEIGHTS_NAME])

    def own_settings(self) -> dict[str, dict[str, Any]]:
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
        """Train as every stage does, and free the data."""
        record = super().train(trainer)
        self.train_dataset, self.memories = None, []
        return record

    def evaluate(self, max_new_tokens: int, batch_size: int) -> dict[str, Answered]:
        """Score the round's model on the tasks of its plan. All processes must call it."""
        names = ("dtype", "trust_remote_code", "attn_implementation")
        loading = {name: vars(self.model)[name] for name in names}
        asked = self.folder, self.plan.evaluated, max_new_tokens, self.max_length, batch_size
        return evaluate_tasks(*asked, **loading)
