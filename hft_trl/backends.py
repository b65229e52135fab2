"""What the backends (DDP, FSDP, DeepSpeed) need so that a half can be frozen, and what they can't do."""

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    fsdp2_prepare_model,
    parse_flag_from_env,
)
from transformers import TrainingArguments

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError

EMPTY = (
    "fsdp_cpu_ram_efficient_loading is true, which leaves the weights of all processes but the first empty, so they can't "
    "be fingerprinted: set it to false."
)
FSDP1 = (
    "fsdp_version is 1, which flattens trainable and frozen parameters into one: set fsdp_version to 2, as in "
    "accelerate_configs/fsdp2.yaml."
)


def fsdp_version(args: TrainingArguments | None = None) -> int | None:
    """
    The version of FSDP that the trainer will run under, known before there is an accelerator.

    Args:
        args ([`~transformers.TrainingArguments`], *optional*):
            The trainer's arguments, which may ask for FSDP themselves.

    Returns:
        `int` or `None`: 1 (accelerate's own default) or 2, and `None` without FSDP.
    """
    asked = args.fsdp_plugin_args if args is not None else None
    if asked is None and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    return int((asked or {}).get("fsdp_version") or os.environ.get("FSDP_VERSION", "1"))


def check_launch(args: TrainingArguments | None = None) -> None:
    """
    Refuse, before a model is loaded, a launch under which a half can't be frozen.

    Args:
        args ([`~transformers.TrainingArguments`], *optional*):
            The trainer's arguments.

    Raises:
        [`HFTError`]: Naming the setting and what to use instead.
    """
    version = fsdp_version(args)
    if version == 1:
        raise HFTError(FSDP1)
    # transformers writes it into the environment too where the trainer's arguments ask for FSDP
    if version == 2 and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise HFTError(EMPTY)


def check_backend(state: AcceleratorState) -> None:
    """
    Refuse a backend, or settings of one, under which a half can't be frozen or checked.

    Args:
        state ([`~accelerate.state.AcceleratorState`]):
            State of the accelerator that the trainer runs on.

    Raises:
        [`HFTError`]: Naming the setting and what to use instead.
    """
    if state.distributed_type == DistributedType.FSDP:
        if state.fsdp_plugin.fsdp_version == 1:
            raise HFTError(FSDP1)
        if state.fsdp_plugin.cpu_ram_efficient_loading:
            raise HFTError(EMPTY)


def check_frozen_dtype(args: TrainingArguments, frozen_dtype: str) -> None:
    """
    Refuse to hold the frozen half in a type of its own where the halves could not be computed with together, or where the
    reference would be another model.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The trainer's arguments.
        frozen_dtype (`str`):
            `"bfloat16"` or `"float16"`.

    Raises:
        [`HFTError`]: Naming the setting to change.
    """
    needed = {"bfloat16": "bf16", "float16": "fp16"}[frozen_dtype]
    if args.mixed_precision != needed:
        raise HFTError(
            f"hft.frozen_dtype is {frozen_dtype}, but mixed_precision is {args.mixed_precision!r}, so the two halves could not "
            f"be computed with together: set {needed} to true, or leave hft.frozen_dtype out."
        )
    if args.deepspeed_plugin is not None:
        raise HFTError(
            f"hft.frozen_dtype is {frozen_dtype}, but DeepSpeed holds a model in one type: leave it out. With bf16, DeepSpeed "
            "keeps master weights of what is trained only, so the frozen half takes 2 bytes each anyway."
        )
    if vars(args).get("precompute_ref_log_probs"):  # TRL computes them before the half is known
        raise HFTError(
            f"hft.frozen_dtype is {frozen_dtype}, but precompute_ref_log_probs computes with the reference before its frozen "
            "half is rounded, so it would not be the policy's: leave one of the two out."
        )


def check_choice(args: TrainingArguments | None, hft_config: HFTConfig, after_elements: bool = False) -> None:
    """
    Refuse a way to choose the half that can't be had together with the backend or with another setting.

    Args:
        args ([`~transformers.TrainingArguments`], *optional*):
            The trainer's arguments.
        hft_config ([`HFTConfig`]):
            What to train.
        after_elements (`bool`, *optional*, defaults to `False`):
            Whether single elements learned in the stage before, which `reselect` may keep.

    Raises:
        [`HFTError`]: Naming the settings, and what to use instead.
    """
    kept = after_elements and hft_config.reselect != "fresh"
    elements = kept or hft_config.strategy == "element"
    if hft_config.method != "hft" or not (elements or hft_config.by_gradient):
        return
    if kept:
        what, remedy = f"hft.reselect is {hft_config.reselect!r} after strategy element", "hft.reselect to fresh"
    elif elements:
        what, remedy = "hft.strategy is 'element'", "hft.strategy to category"
    else:
        what, remedy = "hft.importance is 'gradient_norm'", "hft.importance to weight_norm"
    for name in ("frozen_dtype", "delta_checkpoints"):
        if elements and vars(hft_config)[name]:
            raise HFTError(
                f"{what}, with which no parameter of the layers is frozen as a whole, so hft.{name} would save nothing: leave "
                f"it out, or set {remedy}."
            )
    deepspeed = args.deepspeed_plugin if args is not None else parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if deepspeed or fsdp_version(args) is not None:
        raise HFTError(
            f"{what}, which needs whole parameters and gradients in each process, but {'DeepSpeed' if deepspeed else 'FSDP'} "
            f"divides them: train in one process or with DDP, or set {remedy}."
        )
    if not elements and args is not None and args.mixed_precision == "fp16":
        raise HFTError(
            f"{what}, but in fp16 small gradients become 0 without the scaling that only a training step has: use bf16, or set "
            f"{remedy}."
        )


def saves_shards(accelerator: Accelerator) -> bool:
    """Whether FSDP's state dicts are sharded, so that transformers writes no model that can be loaded."""
    state = accelerator.state
    return state.distributed_type == DistributedType.FSDP and "FULL" not in str(state.fsdp_plugin.state_dict_type)


def shard_reference(accelerator: Accelerator, reference: torch.nn.Module) -> None:
    """
    Shard a reference model with FSDP2 layer by layer, as accelerate shards the policy.

    TRL shards it as one piece, so that every forward gathers the whole model on every process. It leaves alone what is
    sharded already.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator.
        reference (`torch.nn.Module`):
            The whole reference, frozen. It is changed in place.
    """
    fsdp2_prepare_model(accelerator, reference)
    # accelerate keeps the head gathered for the backward pass, which a reference doesn't have.
    reference.set_reshard_after_forward(True)
