"""FSDP and what it shards, known before there is an accelerator."""

import os

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from hft_trl.config import HFTConfig


def fsdp_version(args: TrainingArguments | None = None) -> int | None:
    """Return the version of FSDP that a trainer will run under, `None` without FSDP."""
    asked = args.fsdp_plugin_args if args is not None else None
    if asked is None and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    return int((asked or {}).get("fsdp_version") or os.environ.get("FSDP_VERSION", "1"))


def sharded_by(args: TrainingArguments | None) -> str | None:
    """Return the name of the backend that shards the parameters."""
    if fsdp_version(args) is not None:
        return "FSDP"
    deepspeed = args.deepspeed_plugin if args is not None else parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    return "DeepSpeed" if deepspeed else None


def replicates_frozen(config: HFTConfig, args: TrainingArguments | None) -> bool:
    """Return whether FSDP2 leaves the frozen half whole in every process."""
    return config.method == "hft" and config.replicate_frozen and fsdp_version(args) == 2
