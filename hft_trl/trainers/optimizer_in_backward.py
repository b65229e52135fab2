"""The optimizer inside of the backward pass: every gradient is used and freed before the next one is computed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from hft_trl.errors import HFTError
from hft_trl.frozen.half import Storage


class OptimizerInBackward(Storage):
    """Updates each parameter inside of the backward pass while a trainer trains, see [`update_in_backward`]."""

    frees_gradients = True

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def training_begins(self, trainer: Any) -> None:
        self._handles = update_in_backward(trainer.model.parameters(), trainer.optimizer)

    def training_ends(self, trainer: Any) -> None:  # noqa: ARG002
        while self._handles:
            self._handles.pop().remove()


def update_in_backward(
    parameters: Iterable[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[RemovableHandle]:
    """
    Update each parameter as soon as the backward pass has accumulated its gradient, and free the gradient.

    It stays one optimizer with its groups, schedule and state: an optimizer skips parameters without a gradient, and
    only one parameter has one at a time. The trainer's own call of `step` finds nothing to do. The optimizer must
    update each parameter independently of the others. The returned handles end it.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    devices = {str(parameter.device) for parameter in trained}
    if len(devices) > 1:  # their gradients would come at the same time
        raise HFTError(
            f"hft.optimizer_in_backward is true, but the model lies on {', '.join(sorted(devices))}: load it onto one "
            "device."
        )

    def update(parameter: torch.nn.Parameter) -> None:
        optimizer.step()
        parameter.grad = None

    return [parameter.register_post_accumulate_grad_hook(update) for parameter in trained]
