"""What the backends (DDP, FSDP, DeepSpeed) need so that a half can be frozen, and what they can't do."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from hft_trl.errors import HFTError


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
            raise HFTError(
                "fsdp_version is 1, which flattens trainable and frozen parameters into one: set fsdp_version to 2, as in "
                "accelerate_configs/fsdp2.yaml."
            )
        if state.fsdp_plugin.cpu_ram_efficient_loading:
            raise HFTError(
                "fsdp_cpu_ram_efficient_loading is true, which leaves the weights of all processes but the first empty, so "
                "they can't be fingerprinted: set it to false."
            )
    if state.distributed_type == DistributedType.DEEPSPEED and state.deepspeed_plugin.zero_stage == 3:
        raise HFTError(
            "zero_stage is 3, which partitions the parameters before the half can be chosen: use FSDP2, as in "
            "accelerate_configs/fsdp2.yaml, or ZeRO-2."
        )


def check_frozen_dtype(args: TrainingArguments, frozen_dtype: str) -> None:
    """
    Refuse to hold the frozen half in a type of its own where the two types could not be computed with together.

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
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        raise HFTError(
            f"hft.frozen_dtype is {frozen_dtype}, but zero_stage is 3, which stores all parameters in one type: leave "
            "hft.frozen_dtype out, or use FSDP2, as in accelerate_configs/fsdp2.yaml."
        )
