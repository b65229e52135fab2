"""Models for the paper's questions on the embedded world, one process per seed and start model."""

import dataclasses
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from hft_trl import demo
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError, exit_on_user_error
from hft_trl.experiments.questions import BASE, RUNS, Run
from hft_trl.experiments.runner import Point, check_settings, result_file, run_points
from hft_trl.files import read_object, write_json

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
    Make and score all models without scores, and yield the number of scored models and the total.

    A seed decides the selection, the order of the data and every random state. `flags` are those of
    `recipes/sft_then_dpo.py` for all runs. Unknown flags, flags in which the runs differ, and a folder with scores of
    other flags or versions raise an [`HFTError`].
    """
    output, flags, runs = Path(output_dir), list(flags), list(runs)
    _check_flags(output, flags)
    check_settings(output, flags)
    points = []
    for root in (run for run in runs if run.start in ("", BASE)):
        family = [root, *(run for run in runs if run.start == root.name and root.name != BASE)]
        for seed in range(1, 2 if root.name == BASE else max(seeds, sweep_seeds) + 1):
            asked = [run.name for run in family if seed <= (sweep_seeds if run.sweep else seeds)]
            if asked:
                command = (sys.executable, "-m", __name__, str(output), str(seed), ",".join(asked), *flags)
                points.append(Point(f"{root.name}-{seed}", command, tuple(f"{name}-{seed}" for name in asked)))
    points.sort(key=lambda point: -len(point.results))  # longest first, so that all cores stay busy
    files = [file for point in points for file in point.files(output)]
    yield sum(file.exists() for file in files), len(files)
    for _ in run_points(points, output, workers):
        yield sum(file.exists() for file in files), len(files)


def make_and_score(family: list[Run], seed: int, output: Path, flags: list[str]) -> None:
    """Make a model and those that start from it, write their scores, and remove the models."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hft_trl.demo.probes import evaluate
    from hft_trl.saved_models.half_reset import blend, half_reset

    models = {BASE: demo.MODEL}
    for run in family:
        name = f"{run.name}-{seed}"
        folder, scores_file = output / "models" / name, result_file(output, name)
        if run is not family[0] and scores_file.exists():
            continue
        start = models[run.start or BASE]
        if run.how in ("sft", "dpo"):
            models[run.name] = _train(run, seed, start, folder, flags)
        elif run.how != "base":
            models[run.name] = folder / run.how
            if not models[run.name].exists():  # written completely or not at all
                if run.how == "half-reset":
                    half_reset(str(demo.MODEL), str(start), folder / run.how, HFTConfig(seed=seed, **run.hft))
                else:
                    blend(str(demo.MODEL), str(start), folder / run.how, 0.5)
        if not scores_file.exists():
            model = AutoModelForCausalLM.from_pretrained(models[run.name])
            scores = evaluate(model, AutoTokenizer.from_pretrained(models[run.name]))
            write_json(scores_file, {"run": run.name, "seed": seed, "scores": scores})
    for run in family:
        shutil.rmtree(output / "models" / f"{run.name}-{seed}", ignore_errors=True)


def read_scores(output_dir: str | Path) -> Scores:
    """Return the scores of every model so far."""
    found: Scores = {}
    for path in sorted(Path(output_dir, "scores").glob("*.json")):
        try:
            content = read_object(path, run=str, seed=int, scores=dict)
        except (OSError, ValueError) as error:
            raise HFTError(f"{path} cannot be read ({error}): remove it, and run the same command again.") from error
        found.setdefault(content["run"], {})[content["seed"]] = content["scores"]
    return found


def _train(run: Run, seed: int, start: Path, folder: Path, flags: list[str]) -> Path:
    """Train or resume one stage with the demo's settings, and return its model's folder."""
    from trl import DPOConfig, SFTConfig

    from hft_trl import HFTDPOTrainer, HFTSFTTrainer, ResumableMixin
    from hft_trl.recipe import parse_recipe
    from hft_trl.recipe.folder import open_stages

    class ResumableTrainer(ResumableMixin, HFTSFTTrainer if run.how == "sft" else HFTDPOTrainer): ...

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
        trainer = ResumableTrainer(
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
            raise HFTError(f"{flag} is what the runs differ in and cannot be the same for all: drop it.")
    parse_recipe(["--output_dir", str(output), *flags], {"sft": SFTConfig, "dpo": DPOConfig}, demo.RECIPE)


if __name__ == "__main__":
    with exit_on_user_error():
        output, seed, names, *flags = sys.argv[1:]
        make_and_score([RUNS[name] for name in names.split(",")], int(seed), Path(output), flags)
