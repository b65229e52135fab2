"""Keep single elements of trained parameters frozen (strategy "element")."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hft_trl.frozen.half import Storage
from hft_trl.weights import fingerprint, named_parameters


class _Part(NamedTuple):
    parameter: torch.nn.Parameter
    frozen: torch.Tensor
    values: torch.Tensor
    digest: str


class FrozenElements(Storage):
    """
    Keeps the bits of single elements while a trainer trains, whatever the optimizer does.

    Gradients are masked as they are computed, so that clipping and the optimizer's moments see only the elements that
    learn. What an optimizer adds of its own (weight decay, rounding) is undone after each of its steps, from values
    that are kept: one byte per element of the layers, and the frozen elements once more in the model's type.
    """

    def __init__(self) -> None:
        self._parts: dict[str, _Part] = {}
        self._handles: list[RemovableHandle] = []

    def settle(self, trainer: Any, policy: PreTrainedModel, reference: torch.nn.Module | None) -> None:  # noqa: ARG002
        masks = trainer.hft_selection.masks
        for name, parameter in named_parameters(policy):
            if name in masks.learning:
                frozen = ~masks.draw(name, parameter.shape).to(parameter.device)
                values = parameter.detach()[frozen]
                self._parts[name] = _Part(parameter, frozen, values, fingerprint(values))

    def training_begins(self, trainer: Any) -> None:
        """Mask the gradients, and put the frozen elements back after each step of the optimizer."""
        for name, part in self._parts.items():  # the model may have been brought to its device only now
            device = part.parameter.device
            self._parts[name] = part = part._replace(frozen=part.frozen.to(device), values=part.values.to(device))
            mask = partial(torch.Tensor.masked_fill, mask=part.frozen, value=0)
            self._handles.append(part.parameter.register_hook(mask))
        # accelerate wraps the optimizer that takes the steps
        self._handles.append(trainer.optimizer.optimizer.register_step_post_hook(self._put_back))

    def training_ends(self, trainer: Any) -> None:  # noqa: ARG002
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _put_back(self, *_: Any) -> None:
        for part in self._parts.values():
            part.parameter.masked_scatter_(part.frozen, part.values)

    def check(self) -> None:
        for name, part in self._parts.items():
            if fingerprint(part.parameter.detach()[part.frozen]) != part.digest:
                raise RuntimeError(f"a frozen element of {name} moved during training: the model is not saved")
