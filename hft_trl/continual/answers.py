"""Generate a model's answers to test sets after a round, and score them."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft_trl.backends.zero import whole_models
from hft_trl.chat import complete, most_tokens
from hft_trl.continual.metrics import METRICS
from hft_trl.continual.tasks import Task
from hft_trl.continual.text import encode_prompts
from hft_trl.errors import HFTError
from hft_trl.files import read_object, write_json, writing
from hft_trl.processes import by_first_process

PREDICTIONS = "predictions"


@dataclass(frozen=True)
class Answered:
    """Store the result of a round's model on a task."""

    score: float  # of the task's metric, from 0 to 100
    empty: int  # predictions without any text, which score 0
    truncated: int  # prompts that were truncated from the left


def evaluate_tasks(
    folder: str | Path,
    tasks: Iterable[Task],
    max_new_tokens: int,
    max_length: int | None,
    batch_size: int,
    **loading: Any,
) -> dict[str, Answered]:
    """
    Generate greedy answers to test sets, and return their scores by task in the main process only.

    All processes must call it and share the work. Predictions are written to `predictions/<task>.json`, and reused for
    the same settings. In half precision, batch size and number of processes can change them. `max_length` counts the
    tokens of prompt and answer. `batch_size` is that of each process.
    """
    folder, state, results = Path(folder), PartialState(), {}
    model = tokenizer = None
    for task in tasks:
        path = folder / PREDICTIONS / f"{task.name}.json"
        made_with = {
            "test_digest": hashlib.sha256(json.dumps(task.test).encode()).hexdigest(),
            "max_new_tokens": max_new_tokens,
            "max_length": max_length,
        }
        known = _read(path, made_with) if state.is_main_process else None
        if not any(gather_object([known is not None])):
            if model is None:
                with whole_models():
                    model = AutoModelForCausalLM.from_pretrained(folder, **loading).to(state.device)
                trusted = loading.get("trust_remote_code", False)
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
            limit = min((length for length in (max_length, most_tokens(model)) if length is not None), default=None)
            prompt_length = None if limit is None else max(1, limit - max_new_tokens)
            rows, truncated = encode_prompts([row.prompt for row in task.test], tokenizer, prompt_length)
            with state.split_between_processes(rows) as ours:
                found = complete(model, tokenizer, ours, max_new_tokens, batch_size) if ours else []
                predictions = gather_object(found)
        elif known is not None:
            predictions = [row["prediction"] for row in known["predictions"]]
            truncated = known["result"]["truncated"]
        scored = by_first_process(lambda: _score(path, task, predictions, truncated, made_with, known))  # noqa: B023
        if scored is not None:
            results[task.name] = scored
    return results


def check_lengths(max_length: int | None, max_new_tokens: int, positions: int | None = None) -> int | None:
    """Return the maximum length of prompt and answer in tokens. Reject one without room for prompts."""
    limits = {"sft.max_length": max_length, "the model's positions are": positions}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    for name, limit in limits.items():
        if max_new_tokens >= limit:
            raise HFTError(
                f"max_new_tokens is {max_new_tokens} and {name} {limit}: it must be smaller, to leave room for "
                "prompts."
            )
    return min(limits.values(), default=None)


def _read(path: Path, made_with: dict[str, Any]) -> dict[str, Any] | None:
    """Read what [`_score`] wrote, if it is complete and of the same test set and settings."""
    try:
        content = read_object(path, made_with=dict, predictions=list, result=dict)
        return content if content["made_with"] == made_with else None
    except (OSError, ValueError):
        return None


def _score(
    path: Path,
    task: Task,
    predictions: Sequence[str],
    truncated: int,
    made_with: dict[str, Any],
    known: dict[str, Any] | None,
) -> Answered:
    """Score predictions, and write them with the score unless the file contains the same."""
    prompts, answers = zip(*task.test, strict=True)
    score = METRICS[task.metric](prompts, predictions, answers)
    result = Answered(score, sum(not text.strip() for text in predictions), truncated)
    content = {
        "task": task.name,
        "metric": task.metric,
        "result": asdict(result),
        "made_with": made_with,
        "predictions": [
            {"answer": answer, "prediction": text} for answer, text in zip(answers, predictions, strict=True)
        ],
    }
    if content != known:
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            write_json(path, content, ensure_ascii=False)
    return result
