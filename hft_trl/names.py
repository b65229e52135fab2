"""Names of parameters and modules as the model's class gives them, whatever has wrapped the model since."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# What torch.compile and FSDP's activation checkpointing put into names, at the start and in between.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}


def plain_name(name: str) -> str:
    """
    The name without the parts that wrappers have put into it.

    Args:
        name (`str`):
            Name of a parameter, buffer or module, such as `"model.layers.0._checkpoint_wrapped_module.mlp"`.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def named_parameters(model: "nn.Module", remove_duplicate: bool = True) -> Iterator[tuple[str, "nn.Parameter"]]:
    """
    The parameters of a model by their plain names, in its own order.

    Args:
        model (`torch.nn.Module`):
            The model, perhaps compiled or with checkpoint wrappers, in whole or in parts.
        remove_duplicate (`bool`, *optional*, defaults to `True`):
            Whether a parameter that the model holds under several names comes under the first one only.
    """
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        yield plain_name(name), parameter


def named_modules(model: "nn.Module") -> dict[str, "nn.Module"]:
    """The modules of a model by their plain names; of a wrapper and what it wraps the inner one."""
    return {plain_name(name): module for name, module in model.named_modules()}
