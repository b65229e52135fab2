"""Generate a model's answers to test sets after a round, and score them."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft_trl.backends.zero import whole_models
from hft_trl.chat import complete
from hft_trl.continual.metrics import mean_score
from hft_trl.continual.tasks import Task, encode_prompts
from hft_trl.files import read_object, write_json_once, writing
from hft_trl.processes import by_first_process


@dataclass(frozen=True)
class Answered:
    """Store the result of a round's model on a task."""

    score: float  # of the task's metric, from 0 to 100
    empty: int  # predictions without any text, which score 0
    truncated: int  # prompts that were truncated from the left


def evaluate_tasks(
    folder: Path, tasks: Iterable[Task], max_new_tokens: int, max_length: int | None, batch_size: int, **loading: Any
) -> dict[str, Answered]:
    """
    Generate greedy answers to test sets, and return their scores by task in the main process only.

    All processes must call it and share the work. Predictions are written to `predictions/<task>.json`, and reused for
    the same settings. In half precision, batch size and number of processes can change them. `max_length` counts the
    tokens of prompt and answer. `batch_size` is that of each process.
    """
    state, results, model, tokenizer = PartialState(), {}, None, None
    for task in tasks:
        path = folder / "predictions" / f"{task.name}.json"
        made_with = {
            "test_digest": hashlib.sha256(json.dumps(task.test).encode()).hexdigest(),
            "max_new_tokens": max_new_tokens,
            "max_length": max_length,
        }
        predictions, truncated = _read(path, made_with) if state.is_main_process else (None, 0)
        if not any(gather_object([predictions is not None])):
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
        scored = by_first_process(partial(_score, path, task, made_with, predictions, truncated))
        if scored is not None:
            results[task.name] = scored
    return results


def _read(path: Path, made_with: dict[str, Any]) -> tuple[list[str] | None, int]:
    """Read the predictions that [`_score`] wrote for the same test set and settings, and the truncated prompts."""
    try:
        content = read_object(path, made_with=dict, predictions=list, result=dict)
    except (OSError, ValueError):
        return None, 0
    if content["made_with"] != made_with:
        return None, 0
    return [row["prediction"] for row in content["predictions"]], content["result"]["truncated"]


def _score(path: Path, task: Task, made_with: dict[str, Any], predictions: Sequence[str], truncated: int) -> Answered:
    """Score predictions, and write them with the score unless the file contains the same."""
    answers = [row.answer for row in task.test]
    result = Answered(
        mean_score(task.metric, predictions, answers), sum(not text.strip() for text in predictions), truncated
    )
    content = {
        "task": task.name,
        "metric": task.metric,
        "result": asdict(result),
        "made_with": made_with,
        "predictions": [{"answer": a, "prediction": text} for a, text in zip(answers, predictions, strict=True)],
    }
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        write_json_once(path, content)
    return result
