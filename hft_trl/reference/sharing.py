"""The reference model of preference training: wholly frozen, the model that training started from, and stored once."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoProcessor, PreTrainedModel, TrainingArguments, set_seed
from transformers.utils import logging
from trl import DPOConfig
from trl.trainer.utils import create_model_from_path

from hft_trl.backends.fsdp import fsdp_version, sharded_by
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.frozen import replicated
from hft_trl.frozen.quantized_linear import QuantizedLinear
from hft_trl.selection import marks
from hft_trl.weights import full, named_parameters

logger = logging.get_logger(__name__)


def why_not_shared(args: TrainingArguments, hft_config: HFTConfig) -> str | None:
    """
    Why the frozen half of policy and reference can't be stored once, `None` if it can.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The trainer's arguments.
        hft_config ([`HFTConfig`]):
            What to train.
    """
    if hft_config.method != "hft":
        return "method is fft, which freezes nothing"
    if not hft_config.share_reference:
        return "hft.share_reference is false"
    if vars(args).get("sync_ref_model"):
        return "sync_ref_model moves the reference"
    if replicated.wanted(hft_config, args):
        return None
    backend = sharded_by(args)
    return f"{backend} stores the parameters itself" if backend else None


def is_quantized(reference: torch.nn.Module) -> bool:
    """Whether the reference was loaded quantised."""
    return "hf_quantizer" in vars(reference)


@contextlib.contextmanager
def loaded_once(given: dict[str, Any], hft_config: HFTConfig) -> Iterator[dict[str, Any] | None]:
    """
    Load the policy as TRL would, and put a copy of it that takes no memory in the place of TRL's own reference.

    The copy is empty and filled by [`tie`] as soon as the frozen half is known, or under FSDP2 has the policy's storage
    until it is sharded, so that two whole models are never in memory.

    Args:
        given (`dict[str, Any]`):
            The user's arguments of [`~trl.DPOTrainer`], by name.
        hft_config ([`HFTConfig`]):
            What to train.

    Yields:
        `dict[str, Any]` or `None`: The arguments to call it with, `None` where the reference can't be such a copy.
    """
    model, args = given.get("model"), given.get("args")
    if args is None and isinstance(model, str):
        args = DPOConfig(f"{model.split('/')[-1]}-DPO")  # TRL's own default
    if not isinstance(args, DPOConfig):
        yield None
        return
    sharded = hft_config.method == "hft" and fsdp_version(args) == 2
    if (
        not isinstance(model, str | PreTrainedModel)
        or (args.precompute_ref_log_probs and not sharded)
        or given.get("ref_model") is not None
        or (why_not_shared(args, hft_config) and not sharded)
    ):
        yield None
        return
    loaded, init = {**given, "args": args}, args.model_init_kwargs
    if isinstance(model, str):
        kwargs = {"trust_remote_code": args.trust_remote_code, **(init or {})}
        if sharded or args.distributed_state.distributed_type == "MULTI_GPU":
            kwargs["device_map"] = None  # as TRL: the trainer moves the model to the process's own device
        set_seed(args.seed)
        model = create_model_from_path(model, **kwargs)
        if given.get("processing_class") is None:
            loaded["processing_class"] = AutoProcessor.from_pretrained(
                given["model"], revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
            )
    if not can_be_copied(model):
        logger.warning(
            f"reference: a module of the policy has a forward of its own (of a device map, or of a trainer that had this policy before), "
            f"so the reference can't be a copy of it and is loaded: {sum(p.nbytes for p in model.parameters()):,} bytes more at start. "
            "Save the policy and pass its folder, without a device_map."
        )
        del model  # else three of them would be in memory
        yield None
        return
    if isinstance(given["model"], str):
        args.model_init_kwargs = None  # they are used up; TRL would warn that it does not use them
    try:
        yield {**loaded, "model": model, "ref_model": (alias_copy if sharded else hollow_copy)(model)}
    finally:
        args.model_init_kwargs = init


def check_has_path(given: dict[str, Any]) -> None:
    """
    Refuse a policy from which the trainer can't load its reference.

    TRL makes the reference by a second `from_pretrained` of the policy's path, never by copying the policy.

    Args:
        given (`dict[str, Any]`):
            The user's arguments of the trainer, by name.

    Raises:
        [`HFTError`]: If a reference is needed, and the policy is a model object without a path.
    """
    model, args = given.get("model"), given.get("args")
    if given.get("ref_model") is not None or (args is not None and vars(args).get("precompute_ref_log_probs")):
        return
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
    copied = copy.deepcopy(policy, memo).eval()
    # A half that is drawn on the copy has to be that of the policy
    marks.mark_frozen(copied, {name for name, _ in named_parameters(copied)} - marks.frozen_by_user(policy))
    return copied


def is_hollow(reference: torch.nn.Module) -> bool:
    """Whether the reference is a [`hollow_copy`] that was not filled yet."""
    return all(parameter.numel() == 0 for parameter in reference.parameters())


def is_wholly_sharded(reference: torch.nn.Module) -> bool:
    """Whether FSDP2 has left no parameter of the reference whole."""
    return all(isinstance(parameter, DTensor) for parameter in reference.parameters())


@contextlib.contextmanager
def lent(policy: torch.nn.Module, reference: torch.nn.Module | None) -> Iterator[None]:
    """Let a [`hollow_copy`] compute with the policy's parameters for a while. Any other reference has its own."""
    if reference is None or not is_hollow(reference):
        yield
        return
    theirs = dict(named_parameters(reference))
    empty = {name: parameter.data for name, parameter in theirs.items()}
    try:
        for name, parameter in named_parameters(policy):
            theirs[name].data = parameter.data
        yield
    finally:
        for name, data in empty.items():
            theirs[name].data = data


def tie(policy: torch.nn.Module, reference: torch.nn.Module) -> None:
    """
    Store the frozen half once: every frozen parameter of the reference gets the policy's storage.

    Args:
        policy (`torch.nn.Module`):
            The policy before its first step, its frozen half known.
        reference (`torch.nn.Module`):
            A hollow copy, whose other parameters become copies of the policy's, or a reference that was found equal. What
            FSDP2 has sharded stays as it is.
    """
    hollow, theirs = is_hollow(reference), dict(named_parameters(reference))
    for name, parameter in named_parameters(policy):
        if not parameter.requires_grad and not isinstance(theirs[name], DTensor):
            theirs[name].data = parameter.data
        elif hollow:
            theirs[name].data = parameter.data.clone()
        elif not isinstance(theirs[name], DTensor):  # a copy of its own, made before the policy was moved
            theirs[name].data = theirs[name].data.to(parameter.device)


def memory(policy: torch.nn.Module, reference: torch.nn.Module) -> tuple[int, int]:
    """
    What the reference takes in this process.

    Args:
        policy, reference (`torch.nn.Module`):
            The two models.

    Returns:
        `tuple[int, int]`: Bytes that the reference's weights take beside the policy's, and bytes of storage that both use.
    """
    ours, theirs = _storages(policy), _storages(reference)
    shared = sum(size for place, size in theirs.items() if place in ours)
    return sum(theirs.values()) - shared, shared


def report_memory(policy: torch.nn.Module, reference: torch.nn.Module, reason: str | None) -> None:
    """Say on the main process what is stored once, or the `reason` why nothing is."""
    own, shared = memory(policy, reference)
    parts = sum(isinstance(module, FSDPModule) for module in reference.modules())
    if parts:
        beside = f", and shares {shared:,} with the policy" if shared else ""
        PartialState().print(f"reference: {own:,} bytes in each process, sharded by FSDP2 in {parts} parts{beside}.")
    elif reason is None:
        PartialState().print(f"reference: shares {shared:,} of {own + shared:,} bytes with the policy.")
    else:
        PartialState().print(f"reference: {own:,} bytes of its own, not shared because {reason}.")


def _storages(model: torch.nn.Module) -> dict[tuple[torch.device, int], int]:
    """Bytes by place in memory. A state dict also holds what a quantised weight needs beside its parameter."""
    tensors = [value for value in model.state_dict().values() if isinstance(value, torch.Tensor)]
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    tensors += [tensor for module in quantized for tensor in (module.packed, module.scale)]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return {(tensor.device, tensor.data_ptr()): tensor.nbytes for tensor in local}


def freeze(reference: torch.nn.Module) -> None:
    """Put the reference into eval mode and take every parameter of it out of training."""
    reference.eval().requires_grad_(False)


def first_difference(policy: torch.nn.Module, reference: torch.nn.Module) -> str | None:
    """Name and kind of the first difference between the two models' parameters, `None` if they are equal bit for bit."""
    ours, theirs = dict(named_parameters(policy)), dict(named_parameters(reference))
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
            Whether the user passed the reference. Then another model may be meant, which is only warned of. A quantised
            one is not compared.

    Raises:
        [`HFTError`]: If the reference was loaded from the policy's path and is another model, because the policy was
            edited in memory.
    """
    if given and is_quantized(reference):
        return
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
