"""Repair a tuned model: average it with its base or reset half of it, whichever keeps most and still does the task."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
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
from hft_trl.report.tables import MEASURES, Grid, loss
from hft_trl.retention.meter import Meter
from hft_trl.retention.retention_rows import choose
from hft_trl.saved_models.half_reset import average_text, check_weight, draw, mixed, open_models, write, write_half
from hft_trl.saved_models.saved_model import SavedModel
from hft_trl.selection import find_units
from hft_trl.skeleton import load
from hft_trl.weights import rounds

WEIGHTS = (0.25, 0.5, 0.75)
LONGEST = 1024  # tokens of a row of the task


@dataclass(frozen=True)
class Candidate:
    """Store the weights of the tuned model in a mixture, and what was measured of it."""

    name: str
    outside: float  # outside of the layers
    groups: tuple[float, ...]  # in each group of layers; empty for a Half-Reset
    task_loss: float
    kept: dict[str, float]  # `text_loss`, and `facts` if there are any


@dataclass
class _Bench:
    """Hold one model in memory, put mixtures of the two saved models into it, and measure them."""

    before: SavedModel
    after: SavedModel
    trainer: SFTTrainer
    meter: Meter
    tolerance: float
    found: list[Candidate] = field(default_factory=list)

    @torch.no_grad()
    def measure(self, name: str, shares: dict[str, float], outside: float, groups: Sequence[float]) -> None:
        for key, parameter in self.trainer.model.named_parameters():
            parameter.copy_(mixed(self.before.parameter(key), self.after.parameter(key), shares[key]))
        task_loss = self.trainer.evaluate()["eval_loss"]
        kept = self.meter.measure(self.trainer.model)
        if not math.isfinite(task_loss + kept["text_loss"]):
            losses = f"the task loss {task_loss} and the text loss {kept['text_loss']}"
            raise HFTError(f"{name} has {losses}, which cannot be compared: check the models, or give other rows.")
        self.found.append(Candidate(name, outside, tuple(groups), task_loss, kept))

    def best(self) -> Candidate:
        """Return the candidate with the least text loss among those that do the task nearly as the tuned model."""
        tuned = next(candidate for candidate in self.found if candidate.name == "tuned")
        most = (1 + self.tolerance) * tuned.task_loss
        able = [candidate for candidate in self.found if candidate.task_loss <= most]
        return min(able, key=lambda candidate: (candidate.kept["text_loss"], candidate.task_loss))


def repair(
    base: str,
    tuned: str,
    out: str | Path,
    *,
    texts: str | None = None,
    task: str | None = None,
    facts: str | None = None,
    weights: Sequence[float] = WEIGHTS,
    groups: int = 1,
    config: HFTConfig | None = None,
    tolerance: float = 0.02,
    max_rows: int = 128,
    chat_template: str | None = None,
) -> dict[str, Any]:
    """
    Write the mixture with the least loss on general text among those that do the task nearly as the tuned model.

    Averages with each of `weights` are measured, then those with one group of layers at another weight, and the
    Half-Reset of `config`. The task loss may be above the tuned model's by the share `tolerance`. Returned is the
    content of `repair.json`.
    """
    for weight in weights:
        check_weight(weight)
    for name, value, least in (("tolerance", tolerance, 0), ("max_rows", max_rows, 1), ("groups", groups, 1)):
        if not least <= value < math.inf:
            raise HFTError(f"{name} is {value}: it must be a number from {least}.")
    if base != "demo" and (texts is None or task is None):
        missing = "--texts" if texts is None else "--task"
        raise HFTError(f"{missing} is missing, so no model can be chosen: add it, or give the average with --weight.")
    before, after, out = open_models(base, tuned, out)
    check_output("--out", out)
    layers = {name: unit.layer for unit in find_units(after.skeleton) for name in unit.names if unit.layer is not None}
    number = max(layers.values()) + 1
    if groups > number:
        raise HFTError(f"groups is {groups}, but the model has {number} layers: give at most {number}.")

    def shares(outside: float, each: Sequence[float]) -> dict[str, float]:
        inside = {name: each[layer * groups // number] for name, layer in layers.items()}
        return dict.fromkeys(after.parameters, outside) | inside

    half, options = draw(after, config or HFTConfig()), sorted({0.0, *map(float, weights), 1.0})
    tokenizer = chat.load_tokenizer(str(after.path), chat_template)
    embedded = probe_rows("retention")
    meter = Meter(
        tokenizer,
        texts if texts is not None else [row["text"] for row in embedded],
        facts if facts is not None or base != "demo" else [row["fact"] for row in embedded],
        max_rows=max_rows,
    )
    meter.check(after.skeleton)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(after, tokenizer, _task_rows(task, max_rows), folder)
        bench = _Bench(before, after, trainer, meter, tolerance)
        for weight in logging.tqdm(options, desc="Averages", disable=None):
            name = {0: "base", 1: "tuned"}.get(weight, f"average {weight:g}")
            bench.measure(name, shares(weight, [weight] * groups), weight, [weight] * groups)
        for group in logging.tqdm(range(groups) if groups > 1 else (), desc="Groups", disable=None):
            best = bench.best()
            for weight in options:
                each = (*best.groups[:group], weight, *best.groups[group + 1 :])
                if each != best.groups:
                    name = f"groups {' '.join(f'{share:g}' for share in each)}"
                    bench.measure(name, shares(best.outside, each), best.outside, each)
        types = after.dtypes()
        if not any(rounds(dtype, types[name]) for name, dtype in before.dtypes().items()):
            mixture = dict.fromkeys(after.parameters, 0.0) | dict.fromkeys(half.trainable, 1.0)
            bench.measure(f"half-reset {half.config.ratio:g}", mixture, 1.0, ())
    best = bench.best()
    record = {
        **{"base": base, "tuned": tuned, "tolerance": tolerance, "chosen": best.name},
        "candidates": [asdict(candidate) for candidate in bench.found],
    }
    if best.groups:
        text = average_text(before, after, best.outside, best.groups)
        write(before, after, out, shares(best.outside, best.groups), "Average", text, record=record)
    else:
        write_half(before, after, out, half, record)
    return record


def repair_grid(record: dict[str, Any]) -> Grid:
    """Return a table of the content of `repair.json`."""
    candidates = record["candidates"]
    measures = list(candidates[0]["kept"])
    rows = [
        [
            candidate["name"],
            loss(candidate["task_loss"]),
            *(loss(candidate["kept"][name]) for name in measures),
            "yes" if candidate["name"] == record["chosen"] else "",
        ]
        for candidate in candidates
    ]
    chosen = frozenset(number for number, row in enumerate(rows) if row[-1])
    title = f"{record['tuned']} mixed with {record['base']}"
    return Grid(title, ["model", "task loss", *map(MEASURES.get, measures), "chosen"], rows, chosen)


def _task_rows(task: str | None, most: int) -> Dataset:
    """Read rows of the task, by default questions and instructions of the embedded world."""
    if task is not None:
        rows = sft_dataset(load_split(task), f"task {task!r}")
        return rows.select(choose(range(len(rows)), most))
    probes = [*probe_rows("questions"), *probe_rows("instructions")]
    pairs = [(row["prompt"], row.get("answer") or row["answers"][0]) for row in choose(probes, most)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            for prompt, answer in pairs
        ]
    )


def _trainer(after: SavedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, folder: str) -> SFTTrainer:
    """Load the tuned model into a trainer that measures the loss on the answers of rows, in the model's own type."""
    model, marked = load(str(after.path)), "messages" in rows.column_names
    if marked:
        chat.mark_answers(tokenizer)
    check_rendered(tokenizer, rows, "the task")
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
