"""Run the optimizer inside the backward pass, and free each gradient before the next."""

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from hft_trl.frozen.half import Storage


class OptimizerInBackward(Storage):
    """
    Update each parameter as soon as its gradient is accumulated, and free the gradient.

    It stays one optimizer with its groups, schedule and state: an optimizer skips parameters without a gradient, and
    only one parameter has one at a time. The trainer's own call of `step` finds nothing to do. The optimizer must
    update each parameter independently of the others.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def training_begins(self, trainer: Any) -> None:
        def update(parameter: torch.nn.Parameter) -> None:
            trainer.optimizer.step()
            parameter.grad = None

        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        self._handles = [parameter.register_post_accumulate_grad_hook(update) for parameter in trained]

    def training_ends(self, trainer: Any) -> None:  # noqa: ARG002
        while self._handles:
            self._handles.pop().remove()
