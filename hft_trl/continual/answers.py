"""After a round: what its model answers on the test sets of the tasks seen, and the score of each."""

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
    """
    A task as a round's model answered it.

    Attributes:
        score (`float`): By the task's metric, from 0 to 100.
        empty (`int`): Predictions without any text, which score 0.
        truncated (`int`): Prompts that were cut from the left.
    """

    score: float
    empty: int
    truncated: int


def evaluate_tasks(
    folder: str | Path,
    tasks: Iterable[Task],
    max_new_tokens: int,
    max_length: int | None,
    batch_size: int,
    dtype: str = "auto",
    **how_to_load: Any,
) -> dict[str, Answered]:
    """
    Let a round's model answer test sets greedily, in batches, and score it. Every process has to call, and takes a part.

    What was answered before with the same settings is read, so nothing is generated twice; it is always scored anew. In
    float32 neither the batch size nor the number of processes changes a prediction; in half precision they can.

    Args:
        folder (`str` or `Path`):
            The round's model. `predictions/<task>.json` in it gets each row's answer and prediction, in the test set's
            order.
        tasks (`Iterable[Task]`):
            The tasks.
        max_new_tokens (`int`):
            Longest prediction, in tokens.
        max_length (`int`, *optional*):
            Longest text, in tokens: a prompt may have what `max_new_tokens` leave of it, and of the model's positions.
        batch_size (`int`):
            Prompts in a batch of a process.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type to load the model in.
        **how_to_load (`Any`):
            Further arguments of `AutoModelForCausalLM.from_pretrained`.

    Returns:
        `dict[str, Answered]`: Scores by task, in the first process; the others get an empty one.
    """
    folder, state, found = Path(folder), PartialState(), {}
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
                    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how_to_load).to(state.device)
                tokenizer = AutoTokenizer.from_pretrained(
                    folder, trust_remote_code=how_to_load.get("trust_remote_code", False)
                )
            limit = min((length for length in (max_length, most_tokens(model)) if length is not None), default=None)
            prompt_length = None if limit is None else max(1, limit - max_new_tokens)
            rows, truncated = encode_prompts([row.prompt for row in task.test], tokenizer, prompt_length)
            with state.split_between_processes(rows) as ours:
                predictions = gather_object(
                    complete(model, tokenizer, ours, max_new_tokens, batch_size) if ours else []
                )
        elif known is not None:
            predictions = [row["prediction"] for row in known["predictions"]]
            truncated = known["result"]["truncated"]
        scored = by_first_process(lambda: _score(path, task, predictions, truncated, made_with, known))  # noqa: B023
        if scored is not None:
            found[task.name] = scored
    return found


def check_lengths(max_length: int | None, max_new_tokens: int, positions: int | None = None) -> int | None:
    """
    Check that answers leave room for prompts.

    Args:
        max_length (`int`, *optional*):
            Longest text of prompt and answer, in tokens.
        max_new_tokens (`int`):
            Longest answer, in tokens.
        positions (`int`, *optional*):
            Tokens that the model can take, where it has a limit.

    Returns:
        `int` or `None`: Longest text that a model learns, in tokens.

    Raises:
        [`HFTError`]: If they don't.
    """
    limits = {"sft.max_length": max_length, "the model's positions are": positions}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    for name, limit in limits.items():
        if max_new_tokens >= limit:
            raise HFTError(
                f"max_new_tokens is {max_new_tokens} and {name} {limit}: it must be less, since a prompt gets what it leaves."
            )
    if max_new_tokens < 1:
        raise HFTError(f"max_new_tokens is {max_new_tokens}: it must be at least 1.")
    return min(limits.values(), default=None)


def _read(path: Path, made_with: dict[str, Any]) -> dict[str, Any] | None:
    """What [`_score`] wrote, if it is there, whole, and of the same model and test set."""
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
    there: dict[str, Any] | None = None,
) -> Answered:
    """Score predictions, and write them with the score unless just that is there."""
    score = METRICS[task.metric]([row.prompt for row in task.test], predictions, [row.answer for row in task.test])
    result = Answered(score, sum(not text.strip() for text in predictions), truncated)
    rows = [{"answer": row.answer, "prediction": text} for row, text in zip(task.test, predictions, strict=True)]
    content = {
        "task": task.name,
        "metric": task.metric,
        "result": asdict(result),
        "made_with": made_with,
        "predictions": rows,
    }
    if content != there:
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            write_json(path, content, ensure_ascii=False)
    return result
