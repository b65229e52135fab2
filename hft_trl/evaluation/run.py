"""Evaluation of models on suites, with a cache of finished tasks, and greedy answers to prompts."""

import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM

from hft_trl import demo
from hft_trl.backends.zero import whole_models
from hft_trl.chat import chat, load_tokenizer, prompt_ids
from hft_trl.config import HFTConfig
from hft_trl.environment import package_version
from hft_trl.errors import HFTError, as_user_error, first_line
from hft_trl.evaluation.scores import Evaluation, Score
from hft_trl.evaluation.suites import SUITES, TASKS, Task
from hft_trl.files import check_output, read_object, write_json, writing
from hft_trl.processes import by_first_process
from hft_trl.saved_models.digests import content_digest, model_digest
from hft_trl.saved_models.saved_model import FILES
from hft_trl.skeleton import check_folder
from hft_trl.trainers.compatibility import check
from hft_trl.weights import combined_digest, weight_files

WEIGHTS = "model*.safetensors*"  # some repositories hold a second copy, named consolidated
MEASURED_WITH = ("hft_trl", "lm_eval", "transformers", "torch")


def find_models(names: Iterable[str], base: str | None = None) -> dict[str, Path]:
    """
    Return the folder of each model, the base first. Models of the hub are downloaded.

    A name is a folder, a hub id (`"id@revision"` for a branch, tag or commit), `"demo"` or `"smollm2"`.
    Without `base`, the first of `names` is the base. An unknown name raises an [`HFTError`].
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    with state.local_main_process_first():  # so that only one process downloads
        return {name: find_model(name) for name in dict.fromkeys([*([base] if base else []), *names])}


def find_model(name: str) -> Path:
    """Return the folder of one model of [`find_models`], without waiting for other processes."""
    check_folder(demo.model_path(name))
    folder = Path(demo.model_path(name))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise HFTError(f"{name!r} holds no config.json: give the folder of a saved model.")
        return folder
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=[WEIGHTS, *FILES]))
    except (OSError, ValueError, RuntimeError) as error:
        raise HFTError(
            f"{name!r} is neither a folder nor a model that could be downloaded from the hub: {first_line(error)}"
        ) from error


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
    backend: str = "hf",
) -> Evaluation:
    """
    Evaluate models on suites. All processes have to call it, and get the result.

    `models` are the folders of [`find_models`], the base first. `chat_template` is `"tulu"`, a `.jinja` file, or by
    default the tokenizer's own (Tülu's if it has none). `limit` is the number of items per (sub)task, at least the
    number of processes. Without `run_code`, tasks that run model-written code are skipped. `cache` is the folder of
    finished tasks, by default `~/.cache/hft_trl/evaluation` (or under `XDG_CACHE_HOME`). `backend` is `"hf"` or
    `"vllm"`.
    """
    check(None, HFTConfig())  # FSDP may leave every process but the first with empty weights
    state = PartialState(cpu=not torch.accelerator.is_available())
    if backend == "vllm" and find_spec("vllm") is None:
        raise HFTError("--backend is vllm, which is not installed: see docs/evaluation.md, or leave --backend out.")
    if backend == "vllm" and state.num_processes > 1:
        raise HFTError(f"--backend is vllm in {state.num_processes} processes, but vLLM starts its own: launch one.")
    if limit is not None and limit < state.num_processes:
        raise HFTError(f"--limit is {limit} with {state.num_processes} processes: raise it, or launch fewer.")
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hft_trl", "evaluation")
    is_main = state.is_main_process
    if is_main:
        check_output("--cache", cache)
    chosen = {suite: [task for task in SUITES[suite] if run_code or not task.runs_code] for suite in suites}
    tasks = {task.name: task for members in chosen.values() for task in members}
    versions = {name: package_version(name) for name in MEASURED_WITH}
    digests = by_first_process(lambda: {name: model_digest(folder) for name, folder in models.items()})
    tokenizers = {name: load_tokenizer(str(folder), chat_template) for name, folder in models.items()}
    if any(task.chat for task in tasks.values()):
        for tokenizer in tokenizers.values():
            prompt_ids(tokenizer, "a template that fails is found before a model is loaded")

    def key(model: str, task: Task) -> dict[str, Any]:
        return {
            "model": digests[model],
            "task": task.name,
            "task_files": _task_digest() if task.name.startswith("hft_") else None,
            "num_fewshot": task.num_fewshot,
            "chat_template": tokenizers[model].chat_template if task.chat else None,
            "dtype": dtype,
            "limit": limit,
            "versions": versions,
            **({"backend": backend} if backend != "hf" else {}),
        }

    pairs = [(model, name) for model in models for name in tasks]
    known = by_first_process(lambda: {pair: _read(cache, key(pair[0], tasks[pair[1]])) for pair in pairs})
    missing = [pair for pair in pairs if known[pair] is None]
    if missing:
        from hft_trl.evaluation.harness import ask, load_model, load_tasks

        # Data is loaded before models, so that missing data is reported early
        loaded = load_tasks([task for task in tasks.values() if any(task.name == name for _, name in missing)])
    for model in dict.fromkeys(model for model, _ in missing):
        lm = load_model(backend, models[model], tokenizers[model], dtype, batch_size)
        for task in (tasks[name] for other, name in missing if other == model):
            found = ask(lm, task, loaded[task.name], limit, run_code)
            if is_main:
                _write(cache, key(model, task), found)
            (known[model, task.name],) = broadcast_object_list([found])
        del lm  # before the next one is loaded

    def scores(model: str, members: list[Task]) -> dict[str, Score]:
        figures = [(task, heading, figure) for task in members for heading, figure in task.figures.items()]
        return {heading: _score(known[model, task.name], figure) for task, heading, figure in figures}

    skipped = [task for suite in chosen for task in SUITES[suite] if task.name not in tasks]
    return Evaluation(
        models=digests,
        scores={suite: {model: scores(model, members) for model in models} for suite, members in chosen.items()},
        averaged={suite: [next(iter(task.figures)) for task in members] for suite, members in chosen.items()},
        skipped=[heading for task in skipped for heading in task.figures],
        limit=limit,
        versions=versions,
    )


def sample_answers(
    model: str,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    *,
    chat_template: str | None = None,
    dtype: str = "auto",
    batch_size: int = 16,
    progress: bool = False,
) -> list[str]:
    """
    Return a model's greedy answers to one-turn prompts in its chat template (Tülu's if it has none).

    `model` is a folder, a hub id, `"demo"` or `"smollm2"`. Each process that calls this loads a whole model. An
    unknown model or a prompt that is too long for it raises an [`HFTError`].
    """
    folder = find_model(model)
    weight_files(str(folder))  # for its checks
    tokenizer = load_tokenizer(str(folder), chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    with as_user_error(f"the model {model!r}"), whole_models():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    return chat(loaded, tokenizer, prompts, max_new_tokens, batch_size, progress)


def _task_digest() -> str:
    """Return the SHA-256 (hex) of our tasks' files, grading code and probes."""
    here = Path(__file__).parent
    code = (here / "functions.py", here / "harness.py", Path(demo.__file__).with_name("probes.py"))
    return combined_digest({source.name: content_digest(source) for source in (TASKS, *code, demo.PROBES)})


def _score(results: dict[str, dict[str, Any]], figure: str) -> Score:
    name, _, key = figure.partition(" ")
    metric, _, kind = key.partition(",")
    value, stderr = results[name][key], results[name].get(f"{metric}_stderr,{kind}")
    return Score(
        value=100 * value if isfinite(value) else None,  # a model that diverged
        # The harness writes "N/A" without a standard error
        stderr=100 * stderr if isinstance(stderr, float) and isfinite(stderr) else None,
        samples=results[name].get("sample_len"),
    )


def _read(cache: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    try:
        entry = read_object(cache / f"{combined_digest(key)}.json", results=dict, digest=str)
    except (OSError, ValueError):  # missing or torn
        return None
    return entry["results"] if combined_digest(entry["results"]) == entry["digest"] else None


def _write(cache: Path, key: dict[str, Any], results: dict[str, Any]) -> None:
    numbers = {
        name: {key: value for key, value in figures.items() if isinstance(value, int | float | str)}
        for name, figures in results.items()
    }
    with writing(cache, resumes=False):
        entry = {"key": key, "results": numbers, "digest": combined_digest(numbers)}
        write_json(cache / f"{combined_digest(key)}.json", entry)
