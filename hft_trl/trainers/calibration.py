"""Measure the importance that needs data: gradients of the loss, and weights times their inputs."""

import copy
import dataclasses
import hashlib
import json
import random
from collections.abc import Sized
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hft_trl import reference
from hft_trl.chat import evaluating, most_tokens
from hft_trl.config import HFTConfig
from hft_trl.demo.probes import probe_rows
from hft_trl.errors import HFTError
from hft_trl.files import read_object, write_json, writing
from hft_trl.retention.meter import Meter
from hft_trl.retention.retention_rows import Rows
from hft_trl.selection.counts import shuffled
from hft_trl.selection.importance import Squares
from hft_trl.weights import combined_digest, fingerprints, named_modules, named_parameters

FILE = "_importance.json"  # what begins with a line is not uploaded
LINEAR = {torch.nn.Linear: 0, Conv1D: 1}
"""Linear layers, and the dimension of their weight that is no input's."""


def measured_once(trainer: Trainer, model: PreTrainedModel, names: list[str], config: HFTConfig) -> Squares:
    """
    Return the measured importance, cached for the output folder, weights, rows and settings.

    So a run that resumes draws the selection that it was started with, though on a GPU a second measurement may differ
    in the last bits. The model is whole in every process, and every process has to call.
    """
    by_gradient = config.importance == "gradient_norm"
    rows = drawn_rows(trainer, config) if by_gradient else _source_blocks(trainer, model, config)
    what = [config.importance, config.seed, rows]
    file, key = Path(trainer.args.output_dir) / FILE, _key(trainer, model, names, what)
    squares = None
    if PartialState().is_main_process:
        with suppress(OSError, ValueError):
            content = read_object(file, of=str, squares=dict)
            squares = content["squares"] if content["of"] == key else None
    (squares,) = broadcast_object_list([squares])
    if squares is not None:
        return squares
    model.to(trainer.accelerator.device)  # where training brings it anyway, in some settings only later
    squares = gradient_squares(trainer, model, names, rows) if by_gradient else output_squares(model, names, rows)
    # The last bits may differ between GPUs, and with them the choice
    (squares,) = broadcast_object_list([squares])
    if trainer.args.should_save:
        with writing(file.parent):
            write_json(file, {"of": key, "squares": squares})
    return squares


def _key(trainer: Trainer, model: PreTrainedModel, names: list[str], what: list[Any]) -> str:
    """Return a SHA-256 (hex) of everything that a measurement depends on."""
    read = {"bf16", "fp16", "label_smoothing_factor"}
    others = {field.name for field in dataclasses.fields(TrainingArguments)} - read
    added = [field.name for field in dataclasses.fields(trainer.args) if field.name not in others]
    settings = {name: vars(trainer.args)[name] for name in added if not name.startswith("dataset_")}
    own = vars(trainer).get("ref_model")
    models = [model] if own is None else [model, trainer.accelerator.unwrap_model(own)]
    weights = [combined_digest(fingerprints(named_parameters(each))) for each in models]
    content = [type(trainer).__name__, weights, names, what, settings]
    return hashlib.sha256(json.dumps(content, default=str, sort_keys=True).encode()).hexdigest()


def gradient_squares(
    trainer: Trainer, model: PreTrainedModel, names: list[str], rows: list[dict[str, Any]]
) -> Squares:
    """
    Square the gradients of a trainer's loss, row by row, for the parameters named.

    Each row is a batch of its own, in eval mode, so neither dropout nor the batch size matters. The squares of a
    parameter's elements are added up, and averaged over the rows. The trainer, the model and every
    random state are left as they were.
    """
    squares = dict.fromkeys(names, 0.0)

    def add(name: str, parameter: torch.Tensor) -> None:
        squares[name] += torch.linalg.vector_norm(parameter.grad, dtype=torch.float64).item() ** 2
        parameter.grad = None

    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    metrics = {name: copy.deepcopy(vars(trainer).get(name)) for name in ("_metrics", "_stored_metrics")}  # CPO, ORPO
    if (ref_model := vars(trainer).get("ref_model")) is not None:
        reference.lend(model, trainer.accelerator.unwrap_model(ref_model))
    device = trainer.accelerator.device
    handles = []
    try:
        model.eval().requires_grad_(False).zero_grad()
        for name, parameter in named_parameters(model):
            if name in squares:
                handles.append(parameter.requires_grad_(True).register_post_accumulate_grad_hook(partial(add, name)))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for row in rows:
                inputs = trainer._prepare_inputs(trainer.data_collator([row]))
                with trainer.accelerator.autocast():
                    loss = trainer.compute_loss(model, inputs)
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
        model.requires_grad_(False).zero_grad()
        for parameter in learning:
            parameter.requires_grad_(True)
        vars(trainer).update({name: kept for name, kept in metrics.items() if kept is not None})
    return {name: total / len(rows) for name, total in squares.items()}


def output_squares(model: PreTrainedModel, names: list[str], blocks: list[list[int]]) -> Squares:
    """
    Square the parameters' elements times their inputs (Wanda, https://arxiv.org/abs/2306.11695).

    The squared inputs of a linear layer are averaged over the tokens of the blocks, which are run one by one in eval
    mode. Other parameters (norms, biases, fused experts) count with inputs of 1. The squares are added up. The
    model is left as it was.
    """
    modules = {f"{name}.weight": module for name, module in named_modules(model).items()}
    linear = {name: modules[name] for name in names if type(modules.get(name)) in LINEAR}
    inputs = {name: 0 * module.weight.detach().double().sum(LINEAR[type(module)]) for name, module in linear.items()}

    def add(name: str, _: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs[name] += args[0].float().flatten(0, -2).square().sum(0, dtype=torch.float64)

    handles = [module.register_forward_pre_hook(partial(add, name)) for name, module in linear.items()]
    try:
        with evaluating(model):
            for ids in blocks:
                model(torch.tensor([ids], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    squares, parameters = {}, dict(named_parameters(model))
    for name in names:
        outputs = parameters[name].detach().double().square()
        if name in linear:
            outputs *= (inputs[name] / sum(map(len, blocks))).unsqueeze(LINEAR[type(linear[name])])
        squares[name] = outputs.sum().item()
    return squares


def source_rows(config: HFTConfig) -> Rows:
    """Return the source's text that `config.source_texts` names, or an [`HFTError`] if it names none."""
    if config.source_texts is None:
        raise HFTError(
            "hft.importance is 'wanda', but hft.source_texts is missing: give a text file of what the model shall "
            "keep (or a .jsonl file with a text in each row), or set hft.importance to weight_norm or snr."
        )
    return [row["text"] for row in probe_rows("source")] if config.source_texts == "demo" else config.source_texts


def _source_blocks(trainer: Trainer, model: PreTrainedModel, config: HFTConfig) -> list[list[int]]:
    """The token ids of blocks of the source's text."""
    tokenizer = trainer.processing_class
    tokenizer = tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer
    meter = Meter(tokenizer, texts=source_rows(config), max_rows=config.calibration_samples)
    return [ids[: most_tokens(model)] for ids in meter.texts]


def drawn_rows(trainer: Trainer, config: HFTConfig) -> list[dict[str, Any]]:
    """Return the rows of a trainer's data that gradients are measured on, or reject the data."""
    rows = trainer.train_dataset
    if not isinstance(rows, Sized) or len(rows) == 0:
        raise HFTError(
            f"hft.importance is 'gradient_norm', but train_dataset is {'streamed' if rows is not None else 'missing'} "
            "or empty, so no rows can be drawn from it: pass a data set with a length, or set hft.importance to "
            "weight_norm."
        )
    if isinstance(rows, Dataset):
        rows = trainer._remove_unused_columns(rows)
    order = shuffled(range(len(rows)), random.Random(f"{config.seed}/calibration"))
    drawn = sorted(order[: config.calibration_samples])
    return [rows[number] for number in drawn]
