"""Many small runs on the embedded world, in as many processes as there are cores, and resumable."""

import dataclasses
import multiprocessing
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from hft_trl import demo
from hft_trl.config import HFTConfig
from hft_trl.environment import package_version
from hft_trl.errors import STOPPED, HFTError, Stopped
from hft_trl.experiments.questions import BASE, Run
from hft_trl.files import read_object, write_json, writing
from hft_trl.redact import redact

SETTINGS_FILE = "settings.json"
# Flags of the recipe that a run sets itself
OWN = re.compile(
    r"--(config|model(\..*)?|method|output_dir|overwrite|evaluate|hft\..*|(sft|dpo)\.(method|seed|output_dir))"
)

Scores = dict[str, dict[int, dict[str, float]]]
"""Scores in percent: by run, by seed, by name."""


def run_trials(
    runs: Iterable[Run],
    seeds: int,
    sweep_seeds: int,
    output_dir: str | Path,
    workers: int | None = None,
    flags: Iterable[str] = (),
) -> Iterator[tuple[int, int]]:
    """
    Make and score every model that is not scored yet.

    A score is written as soon as it is there, and a training goes on from its last checkpoint, so the same call continues
    what was interrupted. Models are removed when nothing else starts from them.

    Args:
        runs (`Iterable[Run]`):
            The runs, each after the one it starts from.
        seeds (`int`):
            Number of seeds. A seed decides the selection, the order of the data and every random state.
        sweep_seeds (`int`):
            Number of seeds for the runs of a sweep.
        output_dir (`str` or `Path`):
            Where scores are kept.
        workers (`int`, *optional*):
            Number of processes, each with one thread. Defaults to the number of cores.
        flags (`Iterable[str]`, *optional*):
            Flags of `recipes/sft_then_dpo.py` for every run, such as `--sft.max_steps 100`.

    Yields:
        `tuple[int, int]`: How many models are scored, and how many there will be.

    Raises:
        [`HFTError`]: If a flag is not one of the recipe's or is one that the runs differ in, or the folder holds scores that
            were made with others, or with other versions.
    """
    output, flags, runs = Path(output_dir), list(flags), list(runs)
    _check_flags(output, flags)
    settle_settings(output, flags)
    families = []
    for root in (run for run in runs if run.start in ("", BASE)):
        family = [root, *(run for run in runs if run.start == root.name and root.name != BASE)]
        for seed in range(1, 2 if root.name == BASE else max(seeds, sweep_seeds) + 1):
            asked = [run for run in family if seed <= (sweep_seeds if run.sweep else seeds)]
            families.append((seed, asked))
    families.sort(key=lambda pair: -len(pair[1]))  # the longest first, so that all cores are busy to the end
    total = sum(len(family) for _, family in families)
    missing = [
        (seed, family) for seed, family in families if not all(_file(output, run, seed).exists() for run in family)
    ]
    yield _scored(output, families), total
    with ProcessPoolExecutor(
        workers or os.cpu_count(), multiprocessing.get_context("spawn"), initializer=settle_process, initargs=(output,)
    ) as pool:
        futures = [pool.submit(or_leave, make_and_score, family, seed, output, flags) for seed, family in missing]
        try:
            for future in as_completed(futures):
                future.result()
                yield _scored(output, families), total
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():  # they go on from their last checkpoints another time
                process.terminate()
            raise


def make_and_score(family: list[Run], seed: int, output: Path, flags: list[str]) -> None:
    """
    Make a model and those which start from it, and write what each answers to the embedded world's questions.

    Args:
        family (`list[Run]`):
            A run that starts from the base, then those that start from it.
        seed (`int`):
            The seed.
        output (`Path`):
            The folder of all trials.
        flags (`list[str]`):
            Flags of `recipes/sft_then_dpo.py`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hft_trl.demo.probes import evaluate
    from hft_trl.saved_models.half_reset import blend, half_reset

    models = {BASE: demo.MODEL}
    for run in family:
        if run is not family[0] and _file(output, run, seed).exists():
            continue
        folder = _folder(output, run, seed)
        start = models[run.start or BASE]
        if run.how in ("sft", "dpo"):
            models[run.name] = _train(run, seed, start, folder, flags)
        elif run.how != "base":
            models[run.name] = folder / run.how
            if not models[run.name].exists():  # it appears whole or not at all
                if run.how == "half-reset":
                    half_reset(str(demo.MODEL), str(start), folder / run.how, HFTConfig(seed=seed, **run.hft))
                else:
                    blend(str(demo.MODEL), str(start), folder / run.how, 0.5)
        if not _file(output, run, seed).exists():
            model = AutoModelForCausalLM.from_pretrained(models[run.name])
            scores = evaluate(model, AutoTokenizer.from_pretrained(models[run.name]))
            write_json(_file(output, run, seed), {"run": run.name, "seed": seed, "scores": scores})
    for run in family:
        shutil.rmtree(_folder(output, run, seed), ignore_errors=True)


def read_scores(output_dir: str | Path) -> Scores:
    """The scores of every model that was made so far."""
    found: Scores = {}
    for path in sorted(Path(output_dir, "scores").glob("*.json")):
        try:
            content = read_object(path, run=str, seed=int, scores=dict)
        except (OSError, ValueError) as error:
            raise HFTError(f"{path} can't be read ({error}): remove it, and run the same command again.") from error
        found.setdefault(content["run"], {})[content["seed"]] = content["scores"]
    return found


def _train(run: Run, seed: int, start: Path, folder: Path, flags: list[str]) -> Path:
    """Train one stage with the demo's settings, or go on with it, and return the folder of its model."""
    from trl import DPOConfig, SFTConfig

    from hft_trl import HFTDPOTrainer, HFTSFTTrainer
    from hft_trl.recipe import parse_recipe
    from hft_trl.recipe.folder import open_stages

    words = ["--config", str(demo.RECIPE), "--model", str(start), "--output_dir", str(folder)]
    words += ["--method", run.hft.get("method", "hft"), *flags]
    for key, value in {**run.hft, "seed": seed}.items():
        if key != "method":
            words += [f"--hft.{key}", str(value)]
    words += [
        word for stage in ("sft", "dpo") for word in (f"--{stage}.seed", str(seed), f"--{stage}.disable_tqdm", "true")
    ]
    sft, dpo = parse_recipe(words, {"sft": SFTConfig, "dpo": DPOConfig}).stages.values()
    stage = sft if run.how == "sft" else dataclasses.replace(dpo, model=sft.model, base=None)
    open_stages([stage])
    if not stage.finished():
        stage.load_data()
        trainer = (HFTSFTTrainer if run.how == "sft" else HFTDPOTrainer)(
            model=str(start),
            args=stage.args,
            train_dataset=stage.train_dataset,
            processing_class=stage.load_tokenizer(),
            hft_config=stage.hft,
        )
        stage.train(trainer)
    return stage.folder


def _check_flags(output: Path, flags: list[str]) -> None:
    from trl import DPOConfig, SFTConfig

    from hft_trl.recipe import parse_recipe

    for flag in flags:
        if OWN.fullmatch(flag.partition("=")[0]):
            raise HFTError(f"{flag} is what the runs differ in, so it can't be the same for all: drop it.")
    parse_recipe(["--output_dir", str(output), *flags], {"sft": SFTConfig, "dpo": DPOConfig}, demo.RECIPE)


def settle_settings(
    output: Path, flags: list[str], more: Mapping[str, str] | None = None, packages: Iterable[str] = ()
) -> None:
    """
    Make a folder for scores, and note what all of them have in common: the flags, and the versions of the libraries.

    Args:
        output (`Path`):
            The folder.
        flags (`list[str]`):
            Flags of every run.
        more (`Mapping[str, str]`, *optional*):
            What else they have in common, by name.
        packages (`Iterable[str]`, *optional*):
            Packages whose versions are noted beside those of torch, transformers and trl.

    Raises:
        [`HFTError`]: If the folder holds scores that were made with others, or can't be written.
    """
    names = ("torch", "transformers", "trl", *packages)
    versions = ", ".join(f"{name} {package_version(name)}" for name in names)
    settings = {"flags": shlex.join(redact(flags)), "versions": versions, **(more or {})}
    path = output / SETTINGS_FILE
    if path.exists():
        try:
            before = read_object(path)
        except (OSError, ValueError) as error:
            raise HFTError(f"{path} can't be read ({error}): use another output_dir.") from error
        for key, now in settings.items():
            if before.get(key) != now:
                raise HFTError(
                    f"{output} holds scores made with the {key} {before.get(key) or 'none'}, now they are {now or 'none'}: use the "
                    "same, or another output_dir."
                )
    with writing(output):
        (output / "scores").mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def _scored(output: Path, families: list[tuple[int, list[Run]]]) -> int:
    return sum(_file(output, run, seed).exists() for seed, family in families for run in family)


def _file(output: Path, run: Run, seed: int) -> Path:
    return output / "scores" / f"{run.name}-{seed}.json"


def _folder(output: Path, run: Run, seed: int) -> Path:
    return output / "models" / f"{run.name}-{seed}"


def or_leave(make: Callable[..., None], *args: Any) -> None:
    """Call a function in a worker process, which ends when it is told to: its pool may have given it the next task already."""
    try:
        make(*args)
    except (Stopped, KeyboardInterrupt):
        sys.stdout.flush()
        os._exit(STOPPED)


def settle_process(output: Path) -> None:
    """Prepare a process that makes models: what trainers print goes into a file of its own."""
    import torch

    log = Path(output, f"log-{os.getpid()}.txt").open("a", encoding="utf-8", buffering=1)  # noqa: SIM115 (to the end)
    sys.stdout = sys.stderr = log
    torch.set_num_threads(1)  # as many processes as cores: more threads would wait for each other
