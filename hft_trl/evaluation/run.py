"""Models on suites: what was measured before is read from the cache, what is missing is measured and added to it."""

import hashlib
import json
import os
from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hft_trl import demo
from hft_trl.backends.fsdp import check_launch
from hft_trl.chat import load_tokenizer, prompt_ids
from hft_trl.environment import package_version
from hft_trl.errors import HFTError
from hft_trl.evaluation.scores import Evaluation, Score
from hft_trl.evaluation.suites import SUITES, TASKS, Task, check_harness, tasks_of
from hft_trl.files import read_object, write_json
from hft_trl.saved_models.digests import model_digest

MEASURED_WITH = ("hft_trl", "lm_eval", "transformers", "torch")


def default_cache() -> Path:
    """`~/.cache/hft_trl/evaluation`, or the same under `XDG_CACHE_HOME`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hft_trl" / "evaluation"


def evaluate_models(
    models: dict[str, Path],
    suites: Iterable[str],
    *,
    chat_template: str | None = None,
    dtype: str = "auto",
    batch_size: int = 16,
    limit: int | None = None,
    run_code: bool = False,
    cache: Path | None = None,
) -> Evaluation:
    """
    Evaluate models. Every process has to call, and gets the result.

    Args:
        models (`dict[str, Path]`):
            Folders of the models by name, the base first, see [`find_models`].
        suites (`Iterable[str]`):
            Names of [`~hft_trl.evaluation.suites.SUITES`].
        chat_template (`str`, *optional*):
            `"tulu"` or the path of a `.jinja` file. By default the tokenizer's own, and Tülu's if it has none.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type in which the weights are loaded, `"auto"` for the file's.
        batch_size (`int`, *optional*, defaults to `16`):
            Items of a batch in each process.
        limit (`int`, *optional*):
            Number of items of each (sub)task, by default all.
        run_code (`bool`, *optional*, defaults to `False`):
            Whether tasks may run code that a model wrote. Without it they are skipped.
        cache (`Path`, *optional*):
            Folder of what was measured before, by default [`default_cache`].

    Returns:
        [`Evaluation`]: The scores.

    Raises:
        [`HFTError`]: If the harness is not installed, a model or a task's data can't be loaded, or there are more processes
            than items.
    """
    check_harness()
    check_launch()  # FSDP may leave every process but the first with empty weights
    processes = PartialState(cpu=not torch.accelerator.is_available()).num_processes
    if limit is not None and limit < processes:
        raise HFTError(
            f"--limit {limit} leaves some of the {processes} processes without an item: raise it, or launch fewer."
        )
    cache = cache or default_cache()
    chosen = tasks_of(suites, run_code)
    tasks = {task.name: task for members in chosen.values() for task in members}
    versions = {name: package_version(name) for name in MEASURED_WITH}
    digests = _shared({name: model_digest(folder) for name, folder in models.items()} if _is_main() else None)
    tokenizers = {name: load_tokenizer(str(folder), chat_template) for name, folder in models.items()}
    if any(task.chat for task in tasks.values()):
        for tokenizer in tokenizers.values():
            prompt_ids(tokenizer, "a template that fails is found before a model is loaded")

    def key(model: str, task: Task) -> dict[str, Any]:
        return {
            "model": digests[model],
            "task": task.name,
            "task_files": task_digest() if task.name.startswith("hft_") else None,
            "num_fewshot": task.num_fewshot,
            "chat_template": tokenizers[model].chat_template if task.chat else None,
            "dtype": dtype,
            "limit": limit,
            "versions": versions,
        }

    pairs = [(model, task) for model in models for task in tasks.values()]
    known = {(model, task.name): _read(cache, key(model, task)) for model, task in pairs} if _is_main() else None
    known = _shared(known)
    missing = [(model, task) for model, task in pairs if known[model, task.name] is None]
    # All data is loaded before any model, so that what can't be had is said before time is spent
    if missing:
        from hft_trl.evaluation.harness import SharedOutLM, ask, load_tasks

        loaded = load_tasks({task.name: task for _, task in missing}.values())
    for model in dict.fromkeys(model for model, _ in missing):
        lm = SharedOutLM(models[model], tokenizers[model], dtype, batch_size)
        for task in (task for name, task in missing if name == model):
            found = ask(lm, task, loaded[task.name], limit, run_code)
            if _is_main():
                _write(cache, key(model, task), found)
            known[model, task.name] = _shared(found)
        del lm  # before the next one is loaded
    return Evaluation(
        models=digests,
        scores={
            suite: {
                model: {
                    heading: _score(known[model, task.name], figure)
                    for task in members
                    for heading, figure in task.figures.items()
                }
                for model in models
            }
            for suite, members in chosen.items()
        },
        averaged={suite: [next(iter(task.figures)) for task in members] for suite, members in chosen.items()},
        skipped=[
            heading for suite in chosen for task in SUITES[suite] if task.name not in tasks for heading in task.figures
        ],
        limit=limit,
        versions=versions,
    )


def task_digest() -> str:
    """SHA-256 (hex) of our tasks: their files, what asks and judges them, and the embedded world's probes."""
    digest = hashlib.sha256()
    here, world = Path(__file__).parent, Path(demo.__file__).parent
    code = [here / "functions.py", here / "harness.py", world / "probe_data.py", world / "data.py"]
    for path in (*sorted(TASKS.iterdir()), *code, *sorted(demo.PROBES.iterdir())):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _is_main() -> bool:
    return PartialState(cpu=not torch.accelerator.is_available()).is_main_process


def _shared(value: Any) -> Any:
    """The first process's value, in every process."""
    return broadcast_object_list([value])[0]


def _score(results: dict[str, dict[str, Any]], figure: str) -> Score:
    name, _, key = figure.partition(" ")
    metric, _, kind = key.partition(",")
    value, stderr = results[name][key], results[name].get(f"{metric}_stderr,{kind}")
    return Score(
        value=100 * value if isfinite(value) else None,  # a model that diverged
        # The harness writes "N/A" where there is none
        stderr=100 * stderr if isinstance(stderr, float) and isfinite(stderr) else None,
        samples=results[name].get("sample_len"),
    )


def _file(cache: Path, key: dict[str, Any]) -> Path:
    return cache / f"{_digest(key)}.json"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(cache: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    try:
        entry = read_object(_file(cache, key), results=dict, digest=str)
    except (OSError, ValueError):  # never measured, or torn
        return None
    return entry["results"] if _digest(entry["results"]) == entry["digest"] else None


def _write(cache: Path, key: dict[str, Any], results: dict[str, Any]) -> None:
    numbers = {
        name: {key: value for key, value in figures.items() if isinstance(value, int | float | str)}
        for name, figures in results.items()
    }
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_json(_file(cache, key), {"key": key, "results": numbers, "digest": _digest(numbers)})
    except OSError as error:
        raise HFTError(
            f"the cache {cache} can't be written ({error.strerror}): choose another with --cache."
        ) from error
