"""Repair a tuned model: average it with its base or reset half of it, so that it forgets less."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from hft_trl import chat
from hft_trl.config import HFTConfig
from hft_trl.demo.probes import probe_rows
from hft_trl.errors import HFTError, as_user_error
from hft_trl.files import check_output
from hft_trl.recipe.loading import load_split
from hft_trl.recipe.rows import check_rendered, sft_dataset, untrained_rows
from hft_trl.retention.meter import Meter
from hft_trl.retention.retention_rows import choose
from hft_trl.saved_models.half_reset import check_weight, draw, mixed, open_models, write_average, write_half
from hft_trl.saved_models.saved_model import SavedModel
from hft_trl.skeleton import load
from hft_trl.weights import rounds

WEIGHTS = tuple(tenth / 10 for tenth in range(1, 10))
LONGEST = 1024  # tokens of a row of the task


def repair(
    base: str,
    tuned: str,
    out: str | Path,
    config: HFTConfig,
    *,
    texts: str | None = None,
    task: str | None = None,
    facts: str | None = None,
    weights: Sequence[float] = WEIGHTS,
    tolerance: float = 0.02,
    max_rows: int = 128,
) -> dict[str, Any]:
    """
    Write the mixture with the lowest loss on general text that still does the task.

    Averages with each of `weights` and the Half-Reset of `config` are measured. The task loss may be above the tuned
    model's by the share `tolerance`. Returned is the content of `repair.json`.
    """
    for weight in weights:
        check_weight(weight)
    if base != "demo" and (texts is None or task is None):
        missing = "--texts" if texts is None else "--task"
        raise HFTError(f"{missing} is missing, so no model can be chosen: add it, or give the average with --weight.")
    before, after, out = open_models(base, tuned, out)
    check_output("--out", out)
    half, options = draw(after, config), sorted({0.0, *map(float, weights), 1.0})
    tokenizer, embedded = chat.load_tokenizer(str(after.path)), probe_rows("retention")
    meter = Meter(
        tokenizer,
        texts if texts is not None else [row["text"] for row in embedded],
        facts if facts is not None or base != "demo" else [row["fact"] for row in embedded],
        max_rows=max_rows,
    )
    found: list[dict[str, Any]] = []

    def measure(name: str, weight: float | None) -> None:
        reset = weight is None
        shares = dict.fromkeys(after.parameters, weight or 0.0) | dict.fromkeys(half.trainable if reset else (), 1.0)
        mix(trainer.model, before, after, shares)
        losses = {"task_loss": trainer.evaluate()["eval_loss"], **meter.measure(trainer.model)}
        if not all(map(math.isfinite, losses.values())):
            raise HFTError(f"{name} has {losses}, which cannot be compared: check the models, or give other rows.")
        found.append({"name": name, "weight": weight, **losses})

    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(after, tokenizer, _task_rows(task, max_rows), folder)
        for weight in logging.tqdm(options, desc="Averages", disable=None):
            name = {0: "base", 1: "tuned"}.get(weight, f"average {weight:g}")
            measure(name, weight)
        if not any(rounds(before.dtypes[name], dtype) for name, dtype in after.dtypes.items()):
            measure(f"half-reset {half.config.ratio:g}", None)
    chosen = best(found, tolerance)
    names = {"base": base, "tuned": tuned, "tolerance": tolerance, "chosen": chosen["name"]}
    record = {**names, "candidates": found}
    if chosen["weight"] is None:
        write_half(before, after, out, half, record)
    else:
        write_average(before, after, out, chosen["weight"], record)
    return record


def best(found: Sequence[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """Return the candidate with the lowest text loss that still does the task."""
    tuned = next(candidate for candidate in found if candidate["name"] == "tuned")
    able = [each for each in found if each["task_loss"] <= (1 + tolerance) * tuned["task_loss"]]
    return min(able, key=lambda candidate: (candidate["text_loss"], candidate["task_loss"]))


@torch.no_grad()
def mix(model: torch.nn.Module, before: SavedModel, after: SavedModel, shares: Mapping[str, float]) -> None:
    """Put a mixture of two saved models into one in memory, parameter by parameter."""
    for name, parameter in model.named_parameters():
        parameter.copy_(mixed(before.parameter(name), after.parameter(name), shares[name]))


def _task_rows(task: str | None, most: int) -> Dataset:
    """Read rows of the task, by default questions and instructions of the embedded world."""
    if task is not None:
        rows = sft_dataset(load_split(task), f"task {task!r}")
        return rows.select(choose(range(len(rows)), most))
    pairs = [(row["prompt"], row["answers"][0]) for row in probe_rows("questions")]
    pairs += [(row["prompt"], row["answer"]) for row in probe_rows("instructions")]
    turns = [zip(("user", "assistant"), pair, strict=True) for pair in choose(pairs, most)]
    return Dataset.from_list([{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns])


def _trainer(after: SavedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, folder: str) -> SFTTrainer:
    """Load the tuned model into a trainer that measures the loss on answers, in the model's own type."""
    model, marked = load(str(after.path)), "messages" in rows.column_names
    check_rendered(tokenizer, rows, "the task")
    if marked:
        try:
            chat.mark_answers(tokenizer)
        except HFTError as error:
            raise HFTError(
                f"the chat template of {after.name!r} has no {{% generation %}} markers, so it does not "
                "tell what an answer is: give the rows of the task as prompt and completion."
            ) from error
    args = SFTConfig(
        output_dir=folder,
        assistant_only_loss=marked,
        max_length=min(LONGEST, chat.most_tokens(model) or LONGEST),
        bf16=False,
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,
        report_to="none",
    )
    args._n_gpu = min(args.n_gpu, 1)
    with as_user_error("the loss on the task"):
        trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.eval_dataset = trainer.train_dataset  # given as an argument, it would be tokenized once more
    trainer.remove_callback(PrinterCallback)
    untrained_rows(len(rows), trainer.train_dataset, "the task", args.max_length)
    chat.check_ids(trainer.train_dataset, tokenizer, model.config, after.name)
    return trainer
