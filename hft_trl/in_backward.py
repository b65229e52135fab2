"""The optimizer inside of the backward pass: every gradient is used and freed before the next one is there."""

from collections.abc import Iterable

import torch
from torch.utils.hooks import RemovableHandle


def update_in_backward(
    parameters: Iterable[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[RemovableHandle]:
    """
    Update each parameter as soon as the backward pass has accumulated its gradient, and free the gradient.

    It stays one optimizer, with its groups, its schedule and its state as they are: an optimizer passes over parameters
    that have no gradient, and only one has at a time. So the trainer's own call of `step` finds nothing to do.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`):
            The parameters. What is tied gets one gradient, once all its uses have added to it.
        optimizer (`torch.optim.Optimizer`):
            The optimizer that holds them. It must treat each parameter apart from the others.

    Returns:
        `list[RemovableHandle]`: Handles that end it.
    """

    def update(parameter: torch.nn.Parameter) -> None:
        optimizer.step()
        parameter.grad = None

    return [p.register_post_accumulate_grad_hook(update) for p in parameters if p.requires_grad]
