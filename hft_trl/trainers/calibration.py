"""Gradients of a trainer's own loss over a sample of its data, before training: what importance can go by."""

import copy
import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from hft_trl import reference
from hft_trl.errors import HFTError
from hft_trl.selection.counts import shuffled
from hft_trl.selection.importance import Squares
from hft_trl.weights import named_parameters

logger = logging.get_logger(__name__)


def gradient_squares(trainer: Trainer, model: PreTrainedModel, names: list[str], samples: int, seed: int) -> Squares:
    """
    Square the gradients of a trainer's loss, row by row, for the parameters named.

    Each row is a batch of its own, in eval mode, so neither dropout nor the batch size matters. A gradient is dropped
    as soon as it is squared. The trainer, the model and every random state are left as they were. The model is whole
    in every process, and every process has to call.

    Returns:
        `Squares`: By parameter the sum over its elements of the squared gradient, mean over at most `samples` rows.

    Raises:
        [`HFTError`]: If no rows can be drawn.
    """
    rows = drawn_rows(trainer, samples, seed)
    squares = dict.fromkeys(names, 0.0)
    model.to(trainer.accelerator.device)  # where training brings it anyway, in some settings only later
    with _as_it_was(trainer, model), _watched(model, squares):
        for row in rows:
            inputs = trainer._prepare_inputs(trainer.data_collator([row]))
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(model, inputs)
            loss.backward()
    # The last bits may differ between GPUs, and with them the choice.
    (squares,) = broadcast_object_list([{name: total / len(rows) for name, total in squares.items()}])
    logger.info(f"importance: gradients of {len(rows)} rows.")
    return squares


def drawn_rows(trainer: Trainer, samples: int, seed: int) -> list[dict[str, Any]]:
    """The rows of a trainer's prepared data that gradients are taken over, or an [`HFTError`] if none can be drawn."""
    rows = trainer.train_dataset
    if not isinstance(rows, Sized) or len(rows) == 0:
        raise HFTError(
            f"hft.importance is 'gradient_norm', but train_dataset is {'streamed' if rows is not None else 'missing'} "
            "or empty, so no rows can be drawn from it: pass a data set with a length, or set hft.importance to "
            "weight_norm."
        )
    if isinstance(rows, Dataset):
        rows = trainer._remove_unused_columns(rows)
    drawn = sorted(shuffled(range(len(rows)), random.Random(f"{seed}/calibration"))[:samples])
    return [rows[number] for number in drawn]


@contextmanager
def _as_it_was(trainer: Trainer, model: PreTrainedModel) -> Iterator[None]:
    """Compute in eval mode, and put back what that leaves behind in the trainer, the model and random states."""
    training = [module for module in model.modules() if module.training]
    state = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    metrics = copy.deepcopy(vars(trainer).get("_metrics"))
    device = trainer.accelerator.device
    try:
        model.eval()
        with (
            reference.lent(model, _unwrapped_reference(trainer)),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            yield
    finally:
        for module in training:
            module.training = True
        for parameter, requires_grad, gradient in state:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        if metrics is not None:
            trainer._metrics = metrics


@contextmanager
def _watched(model: PreTrainedModel, squares: dict[str, float]) -> Iterator[None]:
    """Let the parameters that are named in `squares` have gradients, which are added up there, and no others."""

    def add(name: str) -> Any:
        def square(parameter: torch.Tensor) -> None:
            squares[name] += torch.linalg.vector_norm(parameter.grad, dtype=torch.float64).item() ** 2
            parameter.grad = None

        return square

    handles = []
    for name, parameter in named_parameters(model):
        parameter.grad = None
        parameter.requires_grad_(name in squares)
        if name in squares:
            handles.append(parameter.register_post_accumulate_grad_hook(add(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unwrapped_reference(trainer: Trainer) -> torch.nn.Module | None:
    own = vars(trainer).get("ref_model")
    return trainer.accelerator.unwrap_model(own) if own is not None else None
