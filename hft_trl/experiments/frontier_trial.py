"""
Train one model of a frontier in its own process, and measure what it learned and what it kept.

    python -m hft_trl.experiments.frontier_trial OUTPUT METHOD RATE RATIO SEED FLAGS...
"""

import math
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, IntervalStrategy, PreTrainedModel
from trl import SFTConfig, SFTTrainer

from hft_trl import HFTSFTTrainer, ResumableMixin, demo
from hft_trl.checkpoints.whole import last_whole_checkpoint
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError, exit_on_user_error
from hft_trl.evaluation import parse_suites
from hft_trl.evaluation.run import evaluate_models
from hft_trl.experiments.frontier import check_tests
from hft_trl.experiments.grid import ADAPTERS, BASE, FrontierArguments, Trial, trials
from hft_trl.experiments.runner import Point, check_settings, result_file
from hft_trl.files import write_json, writing
from hft_trl.recipe import Recipe, Stage, parse_recipe
from hft_trl.recipe.arguments import RunArguments
from hft_trl.recipe.folder import lock, settings
from hft_trl.recipe.measure import peak_memory, reset_peak_memory
from hft_trl.recipe.parsing import keys
from hft_trl.recipe.recipe import check_evaluation
from hft_trl.retention.meter import MEASURED, Meter
from hft_trl.saved_models.digests import content_digest
from hft_trl.saved_models.half_reset import mixed
from hft_trl.selection import find_units, select

DEFAULT = demo.ASSETS / "frontier.yaml"
GRID = "frontier"  # section of the grid


class ResumableHFTTrainer(ResumableMixin, HFTSFTTrainer):
    """Half or full fine-tuning."""


class ResumableTrainer(ResumableMixin, SFTTrainer):
    """An adapter of peft."""


def parse_frontier(argv: list[str], help_text: str = "") -> tuple[Recipe, FrontierArguments, list[str]]:
    """Return the recipe of all trials, the grid, whose keys are flags too, and the trials' flags."""
    grid = {f"--{key}": f"--{GRID}.{key}" for key in keys((FrontierArguments,))}
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        words.append(f"{grid.get(flag, flag)}{equals}{value}")
    recipe = parse_recipe(words, {"sft": SFTConfig}, DEFAULT, help_text, {GRID: FrontierArguments})
    return recipe, recipe.sections[GRID], words


def frontier_points(recipe: Recipe, grid: FrontierArguments, flags: list[str]) -> list[Point]:
    """Check the settings of all trials, and return the trials' commands, the base first."""
    stage, output, launched = recipe.stages["sft"], Path(recipe.run.output_dir), PartialState().num_processes
    if launched > 1:
        raise HFTError(
            f"num_processes is {launched}, but a frontier starts a process per GPU itself: run it with python, not "
            "with accelerate launch."
        )
    _check_unused(recipe, stage)
    check_tests()
    check_evaluation("tasks", grid.tasks, stage.model)
    adapters = [method for method in grid.methods if method in ADAPTERS]
    if adapters and find_spec("peft") is None:
        raise HFTError(f"{adapters[0]} needs peft: run pip install -c constraints.txt -e '.[frontier]'.")
    found = (Trial(BASE), *trials(grid))
    for trial in {trial.method: trial for trial in found}.values():
        parse_frontier([*flags, *trial.flags()])[0].stages["sft"].check()
    _load_data(stage)
    meter = _meter(stage)
    needed = {figure: vars(meter)[kind] for kind, figure in MEASURED.items()}
    if not needed[grid.kept]:
        given = [name for name, rows in needed.items() if rows]
        raise HFTError(f"kept is {grid.kept}, which retention has no rows for: add them, or give --kept {given[0]}.")
    same = settings(stage) | {
        GRID: {key: vars(grid)[key] for key in ("average", "half_reset", "lora_rank", "tasks")},
        "evaluation": {"split": stage.data.eval_split},
    }
    # Digests of the files are compared, so that a folder can move to another machine
    same["model"]["model_name_or_path"] = demo.shown(stage.model.model_name_or_path)
    same["data"].pop("dataset", None)
    if (texts := stage.hft.source_texts) is not None:
        content = content_digest(Path(texts)) if texts != "demo" else None
        same["hft"] |= {"source_texts": Path(texts).name, "source_texts_content": content}
    flat = {f"{section}.{key}": str(value) for section, values in same.items() for key, value in values.items()}
    with writing(output):
        lock(output)
    # Only `hft:wanda` reads the source texts, so they can be added with it, and left out with it
    check_settings(output, flat, ("peft",), ("hft.source_texts", "hft.source_texts_content"))
    start = (sys.executable, "-m", __name__, str(output))
    return [
        Point(
            trial.name,
            (*start, trial.method, trial.learning_rate, str(trial.ratio or ""), str(trial.seed), *flags),
            result_file(output, trial.name),
        )
        for trial in found
    ]


def _check_unused(recipe: Recipe, stage: Stage) -> None:
    """Reject settings that the grid decides, or that a frontier does not use."""
    unused = {
        "overwrite": (recipe.run.overwrite, RunArguments.overwrite, "remove output_dir to start again"),
        "evaluate": (recipe.run.evaluate, RunArguments.evaluate, "set tasks"),
        "method": (stage.hft.method, HFTConfig.method, "set methods"),
        "hft.ratio": (stage.hft.ratio, HFTConfig.ratio, "set ratios"),
        "hft.seed": (stage.hft.seed, HFTConfig.seed, "set seeds"),
        "sft.seed": (stage.args.seed, SFTConfig.seed, "set seeds"),
        "sft.push_to_hub": (stage.args.push_to_hub, False, "remove it"),
        "retention.every": (stage.retention and stage.retention.every, None, "remove it"),
        "sft.learning_rate": (stage.args.learning_rate, SFTConfig.learning_rate, "set learning_rates"),
    }
    for name, (value, default, instead) in unused.items():
        if value != default:
            raise HFTError(f"{name} is {value!r}, which a frontier does not use: {instead}.")


def run_trial(trial: Trial, output: Path, argv: list[str]) -> None:
    """Train or resume a trial, measure it and what is made from it without training, and write its points."""
    folder = output / "models" / trial.name
    lock(folder)  # a trial of a frontier that was killed may still be saving
    recipe, grid, _ = parse_frontier([*argv, *trial.flags(), "--output_dir", str(folder)])
    stage = recipe.stages["sft"]
    _load_data(stage)
    trainer = make_trainer(stage, trial, grid)
    meter = _meter(stage)
    points, seconds, peak = [], None, None
    rate = float(trial.learning_rate) if trial.learning_rate else None
    with trainer.accelerator.autocast():  # in the type of all later measurements
        base = meter.base(trainer.model) if meter.prompts else None  # nothing is trained yet
    if trial.method != BASE:
        reset_peak_memory()
        checkpoint = last_whole_checkpoint(stage.folder)
        trained = trainer.train(resume_from_checkpoint=checkpoint)
        peak = peak_memory()
        if checkpoint is None:  # else the seconds before it are unknown
            seconds = trained.metrics["train_runtime"]
    trainer.args.loss_type = "nll"  # the task loss is one figure, whatever loss was trained
    for post_hoc in versions(trainer.model, stage, trial, grid):
        wanted = ("eval_loss", "eval_mean_token_accuracy")
        learned = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items() if key in wanted}
        kept = meter.measure(trainer.model, base)
        if not all(map(math.isfinite, (learned["loss"], *kept.values()))):  # no model would dominate it
            raise HFTError(
                f"{trial.name} ended with a task loss of {learned['loss']} and {kept}, which cannot be compared: "
                "lower its learning rate or check the data."
            )
        if grid.tasks:
            learned |= _tasks(trainer, folder / "evaluated", grid.tasks)
        found = {"post_hoc": post_hoc, "learned": learned, "kept": kept, "seconds": seconds, "peak_memory_bytes": peak}
        points.append({**vars(trial), "learning_rate": rate, **found})
    write_json(result_file(output, trial.name), {"points": points})
    shutil.rmtree(folder, ignore_errors=True)


def make_trainer(stage: Stage, trial: Trial, grid: FrontierArguments) -> SFTTrainer:
    given = {
        "model": stage.model.model_name_or_path,
        "args": stage.args,
        "train_dataset": stage.train_dataset,
        "eval_dataset": stage.eval_dataset,
        "processing_class": stage.load_tokenizer(),
    }
    if trial.method not in ADAPTERS:
        return ResumableHFTTrainer(**given, hft_config=stage.hft)
    from peft import LoraConfig, OFTConfig, ShiraConfig

    common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if trial.method == "oft":
        return ResumableTrainer(**given, peft_config=OFTConfig(**common))
    if trial.method == "shira":
        return ResumableTrainer(**given, peft_config=ShiraConfig(r=grid.lora_rank, **common))
    if trial.method == "lora:ffn":
        units = find_units(stage.model.structure())
        # Not the last parts alone: GPT-2's attention has a c_proj too
        slots = {unit.slot for unit in units if unit.layer is not None and unit.category == "feed_forward"}
        common["target_modules"] = sorted(slots)
    adapter = LoraConfig(r=grid.lora_rank, lora_alpha=2 * grid.lora_rank, **common)
    return ResumableTrainer(**given, peft_config=adapter)


@torch.no_grad()
def versions(model: PreTrainedModel, stage: Stage, trial: Trial, grid: FrontierArguments) -> Iterator[str | None]:
    """Put a model, its averages with the base and its Half-Reset into `model`; yield each name."""
    yield None
    half_reset = grid.half_reset and trial.method == "fft"
    if trial.method in (BASE, *ADAPTERS) or not (grid.average or half_reset):
        return
    tuned = {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}
    kwargs = {"trust_remote_code": stage.model.trust_remote_code, **stage.args.model_init_kwargs}
    base = AutoModelForCausalLM.from_pretrained(stage.model.model_name_or_path, **kwargs)
    before = dict(base.named_parameters())
    mixtures = {f"average {share:g}": dict.fromkeys(before, share) for share in grid.average}
    if half_reset:
        stays = select(base, HFTConfig(seed=trial.seed)).trainable
        mixtures["half-reset"] = dict.fromkeys(before, 0.0) | dict.fromkeys(stays, 1.0)
    for made, shares in mixtures.items():
        for name, parameter in model.named_parameters():
            if name in before:  # else it is quantized, and so frozen
                parameter.copy_(mixed(before[name], tuned[name], shares[name]))
        yield made


def _load_data(stage: Stage) -> None:
    if not stage.data.eval_split:
        raise HFTError("sft.eval_split is missing: set the split on which the task loss is measured.")
    if stage.args.load_best_model_at_end:
        raise HFTError("sft.load_best_model_at_end is true, but a frontier measures each model's last step: drop it.")
    stage.args.eval_strategy = IntervalStrategy.EPOCH  # so that the evaluation rows are loaded and checked
    stage.load_data()
    stage.args.eval_strategy = IntervalStrategy.NO  # they are measured after training


def _meter(stage: Stage) -> Meter:
    if stage.retention is None:
        raise HFTError("retention is missing: give texts, facts or prompts, such as --retention.texts general.txt.")
    return stage.meter()


def _tasks(trainer: SFTTrainer, folder: Path, suites: str) -> dict[str, float | None]:
    if isinstance(trainer, ResumableTrainer):
        trainer.model = trainer.model.merge_and_unload()
    trainer._save(str(folder))  # with the start model's bits of a quantized half
    found = evaluate_models({"model": folder}, parse_suites(suites))
    shutil.rmtree(folder)
    return {heading: score.value for scores in found.scores.values() for heading, score in scores["model"].items()}


if __name__ == "__main__":
    with exit_on_user_error():
        output, method, rate, ratio, seed, *argv = sys.argv[1:]
        PartialState(cpu=not torch.accelerator.is_available())
        run_trial(Trial(method, rate, float(ratio) if ratio else None, int(seed)), Path(output), argv)
