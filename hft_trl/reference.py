"""The reference model of preference training: wholly frozen, and the model that training started from."""

import copy
from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from hft_trl.errors import HFTError
from hft_trl.weights import full

logger = logging.get_logger(__name__)


def check_has_path(model: object) -> None:
    """
    Refuse a policy from which the trainer can't load its reference.

    TRL makes the reference by a second `from_pretrained` of the policy's path, never by copying the policy.

    Raises:
        [`HFTError`]: If the policy is a model object without a path.
    """
    if isinstance(model, PreTrainedModel) and not model.config._name_or_path:
        raise HFTError(
            f"the policy is a {type(model).__name__} in memory without a path, so its reference can't be loaded: save it "
            "and pass the folder, or pass ref_model."
        )


def can_be_copied(policy: torch.nn.Module) -> bool:
    """
    Whether a copy of the policy's modules computes with the copy's own parameters.

    What a trainer or a device map has put in place of a module's `forward` may go on calling the original.
    """
    return not any("forward" in vars(module) for module in policy.modules())


def hollow_copy(policy: torch.nn.Module) -> torch.nn.Module:
    """A copy of the policy whose parameters are empty: it takes no memory until [`tie`] fills it."""
    return _copy(policy, lambda parameter: torch.empty(0, dtype=parameter.dtype, device=parameter.device))


def alias_copy(policy: torch.nn.Module) -> torch.nn.Module:
    """A copy of the policy whose parameters are others, on the policy's own storage, so it takes no memory."""
    return _copy(policy, lambda parameter: parameter.data)


def _copy(policy: torch.nn.Module, storage: Callable[[torch.nn.Parameter], torch.Tensor]) -> torch.nn.Module:
    # Parameters that the policy holds twice (tied embeddings) come once, and stay tied in the copy.
    memo = {id(p): torch.nn.Parameter(storage(p), requires_grad=False) for p in policy.parameters()}
    return copy.deepcopy(policy, memo).eval()


def freeze(reference: torch.nn.Module) -> None:
    """Put the reference into eval mode and take every parameter of it out of training."""
    reference.eval()
    reference.requires_grad_(False)


def first_difference(policy: torch.nn.Module, reference: torch.nn.Module) -> str | None:
    """Name and kind of the first difference between the two models' parameters, `None` if they are equal bit for bit."""
    ours, theirs = dict(policy.named_parameters()), dict(reference.named_parameters())
    if ours.keys() != theirs.keys():
        return f"only one of them has the parameter {min(ours.keys() ^ theirs.keys())}"
    for name, parameter in ours.items():
        a, b = full(parameter), full(theirs[name])
        if a.shape != b.shape:
            return f"{name} has shape {tuple(a.shape)} in the policy, {tuple(b.shape)} in the reference"
        if not torch.equal(a.to(b.device), b):
            return f"{name} has other values"
    return None


def check_is_start(policy: torch.nn.Module, reference: torch.nn.Module, given: bool) -> None:
    """
    Check that the reference is the model which training starts from.

    Args:
        policy (`torch.nn.Module`):
            The policy before the first step.
        reference (`torch.nn.Module`):
            The reference, on any device.
        given (`bool`):
            Whether the user passed the reference. Then another model may be meant, which is only warned of.

    Raises:
        [`HFTError`]: If the reference was loaded from the policy's path and is another model, because the policy was
            edited in memory.
    """
    difference = first_difference(policy, reference)
    if difference is None:
        return
    if given:
        logger.warning(f"The reference is not the model that training starts from: {difference}.")
        return
    raise HFTError(
        f"the policy was changed in memory after it was loaded from {policy.config._name_or_path!r}, where its reference "
        f"comes from ({difference}): save the policy and pass the folder, or pass ref_model."
    )
