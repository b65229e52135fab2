"""What the backends (DDP, FSDP, DeepSpeed) need so that a half can be frozen, and what they can't do."""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, ParallelismConfig, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    fsdp2_prepare_model,
    parse_flag_from_env,
)
from transformers import TrainingArguments

from hft_trl.errors import HFTError
from hft_trl.weights import named_parameters, plain_name

if TYPE_CHECKING:
    from hft_trl.recipe import Stage

EMPTY = (
    "fsdp_cpu_ram_efficient_loading is true, which leaves the weights of all processes but the first empty, so they can't "
    "be fingerprinted: set it to false."
)
FSDP1 = (
    "fsdp_version is 1, which flattens trainable and frozen parameters into one: set fsdp_version to 2, as in "
    "accelerate_configs/fsdp2.yaml."
)

INSTEAD = (
    "Larger models are divided by FSDP2 (accelerate_configs/fsdp2.yaml) or ZeRO-3 (accelerate_configs/zero3.yaml)."
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


def sharded_by(args: TrainingArguments | None) -> str | None:
    """Name of the backend that takes the parameters' storage into its own hands, known before there is an accelerator."""
    if fsdp_version(args) is not None:
        return "FSDP"
    deepspeed = args.deepspeed_plugin if args is not None else parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    return "DeepSpeed" if deepspeed else None


def check_launch(args: TrainingArguments | None = None, model: str | torch.nn.Module | None = None) -> None:
    """
    Refuse, before a model is loaded, a launch under which a half can't be frozen.

    Args:
        args ([`~transformers.TrainingArguments`], *optional*):
            The trainer's arguments.
        model (`str` or `torch.nn.Module`, *optional*):
            The model, or where it will be loaded from.

    Raises:
        [`HFTError`]: Naming the setting and what to use instead.
    """
    init = (vars(args).get("model_init_kwargs") if args is not None else None) or {}
    asked = args.parallelism_config if args is not None else None
    if asked is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        asked = ParallelismConfig()  # of the launch configuration
    _check_parallelism(asked)
    for name in ("tp_plan", "tp_size", "distributed_config"):
        if isinstance(init, dict) and init.get(name) is not None:
            raise HFTError(f"model_init_kwargs has {name}, which divides each matrix over GPUs: drop it. {INSTEAD}")
    # A model object has been placed by its owner
    if not isinstance(model, torch.nn.Module) and "device_map" not in init:
        _check_one_gpu(args)
    version = fsdp_version(args)
    if version == 1:
        raise HFTError(FSDP1)
    # transformers writes it into the environment too where the trainer's arguments ask for FSDP
    if version == 2 and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise HFTError(EMPTY)


def check_chain(stages: "Sequence[Stage]") -> None:
    """
    Refuse stages of which one could not load what the stage before it saves.

    Args:
        stages (`Sequence[Stage]`):
            The stages in order, each of which starts from the model of the one before.

    Raises:
        [`HFTError`]: Naming the type that would round.
    """
    for first, then in itertools.pairwise(stages):
        if first.hft is None or then.hft is None or (first.hft.method, then.hft.method) != ("fft", "hft"):
            continue
        dtype = (then.args.model_init_kwargs or {}).get("dtype")
        upcast = fsdp_version(first.args) == 2 and first.args.mixed_precision in ("bf16", "fp16")
        if upcast and str(dtype).removeprefix("torch.") in ("bfloat16", "float16"):
            raise HFTError(
                f"model.dtype is {dtype}, but under FSDP2 in mixed precision TRL saves what {first.name} trains with method fft in float32, "
                f"which {then.name} with method hft would have to round: set model.dtype to float32, or method to hft in both."
            )


def _check_parallelism(config: ParallelismConfig | None) -> None:
    sizes = {"tp_size": config.tp_size, "cp_size": config.cp_size, "sp_size": config.sp_size} if config else {}
    for name, size in sizes.items():
        if size > 1:
            raise HFTError(
                f"parallelism_config has {name} {size}, but tensor, context and sequence parallelism were not tried with a frozen "
                f"half: set it to 1. {INSTEAD}"
            )


def _check_one_gpu(args: TrainingArguments | None) -> None:
    """TRL loads a model with `device_map="auto"` in a process that is alone: its layers would take turns on all GPUs."""
    visible = 0 if args is not None and args.use_cpu else torch.cuda.device_count()
    if visible > 1 and PartialState().num_processes == 1:
        raise HFTError(
            f"{visible} GPUs are visible to one process, over which TRL would divide the model's layers, so that only one GPU works "
            "at a time: start one process for each with accelerate launch --config_file accelerate_configs/ddp.yaml (or fsdp2.yaml), "
            "or show it one with CUDA_VISIBLE_DEVICES=0."
        )


def check_backend(state: AcceleratorState) -> None:
    """
    Refuse a backend, or settings of one, under which a half can't be frozen or checked.

    Args:
        state ([`~accelerate.state.AcceleratorState`]):
            State of the accelerator that the trainer runs on.

    Raises:
        [`HFTError`]: Naming the setting and what to use instead.
    """
    _check_parallelism(state.parallelism_config)
    if state.distributed_type == DistributedType.FSDP:
        if state.fsdp_plugin.fsdp_version == 1:
            raise HFTError(FSDP1)
        if state.fsdp_plugin.cpu_ram_efficient_loading:
            raise HFTError(EMPTY)


def saves_shards(accelerator: Accelerator) -> bool:
    """Whether FSDP's state dicts are sharded, so that transformers writes no model that can be loaded."""
    state = accelerator.state
    return state.distributed_type == DistributedType.FSDP and "FULL" not in str(state.fsdp_plugin.state_dict_type)


def start_types(model: torch.nn.Module) -> dict[str, torch.dtype]:
    """Types of the parameters that learn, by name, before accelerate's FSDP2 makes all of them float32 in mixed precision."""
    return {name: parameter.dtype for name, parameter in named_parameters(model) if parameter.requires_grad}


def cast_back(state_dict: dict[str, torch.Tensor], types: Mapping[str, torch.dtype]) -> None:
    """
    Give the tensors of a gathered state dict their start model's types, in place and one by one.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            Tensors by parameter name, perhaps with the names of wrappers in between.
        types (`Mapping[str, torch.dtype]`):
            Types by parameter name, as [`start_types`] gives them. Other tensors stay as they are.
    """
    for name, tensor in state_dict.items():
        state_dict[name] = tensor.to(types.get(plain_name(name), tensor.dtype))


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
