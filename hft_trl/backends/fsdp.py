"""What the backends (DDP, FSDP, DeepSpeed) need so that a half can be frozen, and what they can't do."""

import os

import torch
from accelerate import Accelerator, ParallelismConfig
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
    "fsdp_cpu_ram_efficient_loading is true, which leaves the weights of all processes but the first empty, so they "
    "can't be fingerprinted: set it to false."
)
FSDP1 = (
    "fsdp_version is 1, which flattens trainable and frozen parameters into one: set fsdp_version to 2, as in "
    "accelerate_configs/fsdp2.yaml."
)


def fsdp_version(args: TrainingArguments | None = None) -> int | None:
    """
    Return the version of FSDP that a trainer will run under, `None` without FSDP.

    It is known before an accelerator exists, from the trainer's arguments and the environment.
    """
    asked = args.fsdp_plugin_args if args is not None else None
    if asked is None and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    return int((asked or {}).get("fsdp_version") or os.environ.get("FSDP_VERSION", "1"))


def sharded_by(args: TrainingArguments | None) -> str | None:
    """
    Name of the backend that takes the parameters' storage into its own hands, known before there is an accelerator.
    """
    if fsdp_version(args) is not None:
        return "FSDP"
    deepspeed = args.deepspeed_plugin if args is not None else parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    return "DeepSpeed" if deepspeed else None


def replicates_frozen(config: HFTConfig, args: TrainingArguments | None) -> bool:
    """Return whether FSDP2 leaves the frozen half whole in every process."""
    return config.method == "hft" and config.replicate_frozen and fsdp_version(args) == 2


def parallel_sizes(config: ParallelismConfig | None) -> dict[str, int]:
    """Return the sizes of tensor, context and sequence parallelism by name, none without a configuration."""
    return {"tp_size": config.tp_size, "cp_size": config.cp_size, "sp_size": config.sp_size} if config else {}


def check_backend(state: AcceleratorState) -> None:
    """
    Reject a backend, or settings of one, that only the accelerator shows: those of a plugin object.

    Raises:
        [`HFTError`]: Naming the setting and what to use instead.
    """
    for name, size in parallel_sizes(state.parallelism_config).items():
        if size > 1:
            raise HFTError(
                f"parallelism_config has {name} {size}, which was not tried with a frozen half: set it to 1, and "
                "shard larger models with FSDP2 (accelerate_configs/fsdp2.yaml) or ZeRO-3 "
                "(accelerate_configs/zero3.yaml)."
            )
    if state.distributed_type == DistributedType.FSDP:
        if state.fsdp_plugin.fsdp_version == 1:
            raise HFTError(FSDP1)
        if state.fsdp_plugin.cpu_ram_efficient_loading:
            raise HFTError(EMPTY)


def shard_reference(accelerator: Accelerator, reference: torch.nn.Module) -> None:
    """
    Shard a frozen reference with FSDP2 layer by layer, in place, as accelerate shards the policy.

    TRL would shard it as one piece, so that every forward pass gathers the whole model on every process. TRL leaves a
    model alone that is sharded already.
    """
    fsdp2_prepare_model(accelerator, reference)
    # accelerate keeps the head gathered for the backward pass, which a reference doesn't have.
    reference.set_reshard_after_forward(True)
