"""Check DeepSpeed ZeRO's settings for HFT, and handle parameters that it partitions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState
from transformers import TrainingArguments
from transformers.integrations import deepspeed as integration
from transformers.utils import logging

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.weights import is_partitioned

logger = logging.get_logger(__name__)

UNCAST = (
    "DeepSpeed's mixed precision casts the whole model, so train without (mixed_precision 'no' in the launch "
    "configuration and bf16 false) or under FSDP2"
)


def prepare(args: TrainingArguments, hft_config: HFTConfig) -> None:
    """Set DeepSpeed up for a trainer that is about to be built, and check that its settings suit HFT."""
    plugin = args.deepspeed_plugin
    # An earlier trainer of this process has left its own settings in the state that transformers shares
    plugin.set_deepspeed_weakref()
    if plugin.zero_stage != 3:
        return
    if not plugin.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save"):
        raise HFTError(
            "zero3_save_16bit_model is false, so the model would not be saved as one that can be loaded: set it to "
            "true, as in accelerate_configs/zero3.yaml (in a DeepSpeed file "
            "stage3_gather_16bit_weights_on_model_save)."
        )
    kwargs = dict(args.activation_checkpointing_kwargs or {})
    if hft_config.method != "hft" or not args.activation_checkpointing or kwargs.get("use_reentrant"):
        return
    # As TRL does for adapters: the other kind fails with `CheckpointError` where a parameter is frozen
    if kwargs.get("use_reentrant") is False:
        logger.warning(
            "use_reentrant is False, but under ZeRO-3 frozen parameters need reentrant gradient checkpointing: it is "
            "set to True."
        )
    # transformers reads the new name, TRL the old one
    args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs = {**kwargs, "use_reentrant": True}


def cast(model: torch.nn.Module, state: AcceleratorState) -> str | None:
    """Cast the parameters as DeepSpeed would when training starts, and return the fix if that rounds."""
    for key, dtype in (("bf16.enabled", torch.bfloat16), ("fp16.enabled", torch.float16)):
        if state.deepspeed_plugin.get_value(key) is True:
            for parameter in model.parameters():
                if not is_partitioned(parameter):  # else it was loaded in this type
                    parameter.data = parameter.data.to(dtype)
            return UNCAST
    return None


@contextmanager
def whole_models() -> Iterator[None]:
    """Build or load models whole on this process in this context, where ZeRO-3 would partition them."""
    before = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if before is not None and before() is not None:
            integration.set_hf_deepspeed_config(before())
