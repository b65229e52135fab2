"""Provide the frozen reference of preference training, with its frozen half stored once."""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoProcessor, PreTrainedModel, TrainingArguments, set_seed
from transformers.utils import logging
from trl import DPOConfig
from trl.trainer.utils import create_model_from_path

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.selection.units import frozen_by_user, mark_frozen
from hft_trl.weights import full, named_parameters

logger = logging.get_logger(__name__)


def why_not_shared(args: TrainingArguments, hft_config: HFTConfig) -> str | None:
    """Return why the frozen half of policy and reference cannot be stored once, `None` if it can."""
    from hft_trl.backends.fsdp import replicates_frozen, sharded_by

    if hft_config.method != "hft":
        return "method is fft, which freezes nothing"
    if not hft_config.share_reference:
        return "hft.share_reference is false"
    if vars(args).get("sync_ref_model"):
        return "sync_ref_model moves the reference"
    backend = sharded_by(args)
    if backend is None or replicates_frozen(hft_config, args):
        return None
    return f"{backend} stores the parameters itself"


@contextlib.contextmanager
def loaded_once(given: dict[str, Any], hft_config: HFTConfig) -> Iterator[dict[str, Any] | None]:
    """
    Load the policy as TRL would, and pass an empty copy of it as the reference.

    The copy is empty until [`tie`] fills it when the frozen half is known. Under FSDP2 it has the policy's storage
    until it is sharded, so that two whole models are never in memory. Yields the arguments to call [`~trl.DPOTrainer`]
    with in place of those that were `given`, `None` where the reference cannot be such a copy.
    """
    from hft_trl.backends.fsdp import fsdp_version

    model, args = given.get("model"), given.get("args")
    if args is None and isinstance(model, str):
        args = DPOConfig(f"{model.split('/')[-1]}-DPO")  # TRL's own default
    copies = isinstance(args, DPOConfig) and isinstance(model, str | PreTrainedModel)
    if not copies or given.get("ref_model") is not None:
        yield None
        return
    sharded = hft_config.method == "hft" and fsdp_version(args) == 2
    if not sharded and (args.precompute_ref_log_probs or why_not_shared(args, hft_config)):
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
    # A forward of a module's own may call the original module
    if any("forward" in vars(module) for module in model.modules()):
        logger.warning(
            "reference: a module of the policy has a forward of its own (of a device map, or of a trainer that had "
            "this policy before), so the reference cannot be a copy of it and is loaded: "
            f"{sum(p.nbytes for p in model.parameters()):,} bytes more at start. Save the policy and pass its folder, "
            "without a device_map."
        )
        del model  # else three of them would be in memory
        yield None
        return
    if isinstance(given["model"], str):
        args.model_init_kwargs = None  # they are used up; TRL would warn that it does not use them
    try:
        yield {**loaded, "model": model, "ref_model": copied(model, hollow=not sharded)}
    finally:
        args.model_init_kwargs = init


def check_has_path(given: dict[str, Any]) -> None:
    """Reject a policy object without a path, because TRL loads the reference from the path."""
    model, args = given.get("model"), given.get("args")
    needed = given.get("ref_model", model) is None  # else the trainer takes none, or has one
    precomputed = args is not None and vars(args).get("precompute_ref_log_probs")
    if needed and not precomputed and isinstance(model, PreTrainedModel) and not model.config._name_or_path:
        raise HFTError(
            f"the policy is a {type(model).__name__} in memory without a path, so its reference cannot be loaded: "
            "save it and pass the folder, or pass ref_model."
        )


def copied(policy: torch.nn.Module, hollow: bool) -> torch.nn.Module:
    """Copy the policy without memory: with empty parameters until [`tie`], or with its storage."""
    # Parameters that the policy holds twice (tied embeddings) come once, and stay tied in the copy.
    storages = ((p, p.data.new_empty(0) if hollow else p.data) for p in policy.parameters())
    memo = {id(p): torch.nn.Parameter(storage, requires_grad=False) for p, storage in storages}
    reference = copy.deepcopy(policy, memo).eval()
    # A half that is drawn on the copy has to be that of the policy
    mark_frozen(reference, {name for name, _ in named_parameters(reference)} - frozen_by_user(policy))
    return reference


def is_hollow(reference: torch.nn.Module) -> bool:
    """Return whether the reference is a hollow copy that is not filled yet."""
    return all(parameter.numel() == 0 for parameter in reference.parameters())


def lend(policy: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Let a hollow copy use the policy's parameters until [`tie`]. Other references have their own."""
    theirs = dict(named_parameters(reference))
    for name, parameter in named_parameters(policy):
        if theirs[name].numel() == 0:
            theirs[name].data = parameter.data


def tie(policy: torch.nn.Module, reference: torch.nn.Module) -> None:
    """
    Store the frozen half once: every frozen parameter of the reference gets the policy's storage.

    What else is empty in a hollow copy, or lent, becomes a copy of the policy's. What FSDP2 has sharded stays.
    """
    theirs = dict(named_parameters(reference))
    for name, parameter in named_parameters(policy):
        other = theirs[name]
        if isinstance(other, DTensor):
            continue
        if not parameter.requires_grad:
            other.data = parameter.data
        elif other.numel() == 0 or other.data_ptr() == parameter.data_ptr():
            other.data = parameter.data.clone()
        else:  # a copy of its own, made before the policy was moved
            other.data = other.data.to(parameter.device)


def memory(policy: torch.nn.Module, reference: torch.nn.Module) -> tuple[int, int]:
    """Return the bytes of the reference that are not shared in this process, and the shared ones."""
    ours, theirs = _storages(policy), _storages(reference)
    shared = sum(size for place, size in theirs.items() if place in ours)
    return sum(theirs.values()) - shared, shared


def report_memory(policy: torch.nn.Module, reference: torch.nn.Module, reason: str | None) -> None:
    """Print what is stored once, or the `reason` why nothing is."""
    own, shared = memory(policy, reference)
    parts = sum(isinstance(module, FSDPModule) for module in reference.modules())
    text = f"{own:,} bytes of its own, not shared because {reason}"
    if parts:
        beside = f", and shares {shared:,} with the policy" if shared else ""
        text = f"{own:,} bytes in each process, sharded by FSDP2 in {parts} parts{beside}"
    elif reason is None:
        text = f"shares {shared:,} of {own + shared:,} bytes with the policy"
    PartialState().print(f"reference: {text}.")


def _storages(model: torch.nn.Module) -> dict[tuple[torch.device, int], int]:
    """Return bytes by address. A state dict also holds the quantization state of weights."""
    tensors = [value for value in model.state_dict().values() if isinstance(value, torch.Tensor)]
    tensors += model.parameters()  # those of a QuantizedLinear are in no state dict
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return {(tensor.device, tensor.data_ptr()): tensor.nbytes for tensor in local}


def check_is_start(policy: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Reject a reference that differs from the policy though it was loaded from its path."""
    theirs = dict(named_parameters(reference))
    for name, parameter in named_parameters(policy):
        other = full(theirs[name]) if name in theirs else None
        if other is None or not torch.equal(full(parameter).to(other.device), other):
            raise HFTError(
                f"the policy was changed in memory after loading from {policy.config._name_or_path!r}, where its "
                f"reference comes from ({name} differs): save the policy and pass the folder, or pass ref_model."
            )


def settle(trainer: Any, policy: PreTrainedModel, storages: Iterable[Any], given: bool) -> bool:
    """
    Freeze a trainer's reference, store both models, and share the frozen half where possible.

    Returns whether it is. The reference has to be the model that training starts from, unless it was `given`.
    """
    # Also of trainers that always load it themselves. With method fft it is the parent's business
    own, reference, reason = vars(trainer).get("ref_model"), None, "there is no reference"
    if own is not None and trainer.hft_config.method == "hft":
        reference = trainer.accelerator.unwrap_model(own, keep_torch_compile=False)
        reason = why_not_shared(trainer.args, trainer.hft_config)
        if reason is None and all(isinstance(parameter, DTensor) for parameter in reference.parameters()):
            reason = "FSDP has sharded all of it"
        reference.eval().requires_grad_(False)
        if given:  # it may be another model on purpose
            reason = reason or "ref_model was passed, which is left as it is"
        elif reason is not None or not is_hollow(reference):
            check_is_start(policy, reference)
    for storage in storages:
        storage.settle(trainer, policy, None if given else reference)
    if reference is not None:
        if reason is None:
            tie(policy, reference)
        report_memory(policy, reference, reason)
    return reference is not None and reason is None
