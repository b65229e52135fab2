"""The optimizer inside of the backward pass: every gradient is used and freed before the next one is there."""

from collections.abc import Iterable

import torch
from torch.utils.hooks import RemovableHandle

from hft_trl.errors import HFTError


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

    Raises:
        [`HFTError`]: If they lie on several devices, whose gradients come at the same time.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    devices = {str(parameter.device) for parameter in trained}
    if len(devices) > 1:
        raise HFTError(
            f"hft.optimizer_in_backward is true, but the model lies on {', '.join(sorted(devices))}: load it onto one device."
        )

    def update(parameter: torch.nn.Parameter) -> None:
        optimizer.step()
        parameter.grad = None

    return [parameter.register_post_accumulate_grad_hook(update) for parameter in trained]
