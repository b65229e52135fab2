"""Single elements that stay frozen in parameters of which others learn: strategy "element" in training."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from hft_trl.selection import Masks
from hft_trl.weights import fingerprint, named_parameters


class _Part(NamedTuple):
    parameter: torch.nn.Parameter
    frozen: torch.Tensor
    values: torch.Tensor
    digest: str


class FrozenElements:
    """
    Keeps the bits of single elements, whatever the optimizer does, as long as it is entered (`with frozen_elements: ...`).

    Gradients are masked as they are computed, so that clipping and the optimizer's moments see the elements that learn only.
    What an optimizer adds of its own (weight decay, rounding) is undone after each of its steps, by values that are kept: one
    byte for each element of the layers, and the frozen ones once more in the model's type.

    Args:
        model (`torch.nn.Module`):
            The model with the start model's weights, before anything has wrapped it.
        masks ([`Masks`]):
            Which elements learn.
    """

    def __init__(self, model: torch.nn.Module, masks: Masks) -> None:
        self._parts: dict[str, _Part] = {}
        self._handles: list[RemovableHandle] = []
        for name, parameter in named_parameters(model):
            if name in masks.learning:
                frozen = ~masks.draw(name, parameter.shape).to(parameter.device)
                values = parameter.detach()[frozen]
                self._parts[name] = _Part(parameter, frozen, values, fingerprint(values))

    def __enter__(self) -> None:
        """Nothing is held before [`watch`] says by what the model is trained."""

    def __exit__(self, *_: object) -> None:
        # Another trainer may go on with the same model.
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Mask the gradients, and put the frozen elements back after each step of the optimizer that trains the model."""
        for name, part in self._parts.items():  # the model may have been brought to its device only now
            device = part.parameter.device
            self._parts[name] = part = part._replace(frozen=part.frozen.to(device), values=part.values.to(device))
            mask = partial(torch.Tensor.masked_fill, mask=part.frozen, value=0)
            self._handles.append(part.parameter.register_hook(mask))
        self._handles.append(optimizer.register_step_post_hook(self._put_back))

    @torch.no_grad()
    def _put_back(self, *_: Any) -> None:
        for part in self._parts.values():
            part.parameter.masked_scatter_(part.frozen, part.values)

    def check(self) -> None:
        """
        Compare the frozen elements with their fingerprints.

        Raises:
            [`RuntimeError`]: Naming the first parameter of which a frozen element moved.
        """
        for name, part in self._parts.items():
            if fingerprint(part.parameter.detach()[part.frozen]) != part.digest:
                raise RuntimeError(f"a frozen element of {name} moved during training: nothing was saved as a success")
