"""What the backends (DDP, FSDP, DeepSpeed) need so that a half can be frozen, and what they can't do."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    broadcast_object_list,
    fsdp2_prepare_model,
    gather_object,
    parse_flag_from_env,
)
from datasets import Dataset, is_caching_enabled, load_from_disk
from datasets.config import DATASET_STATE_JSON_FILENAME
from transformers import TrainingArguments

from hft_trl.errors import HFTError
from hft_trl.weights import fingerprint, full

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


def make_hashable(reference: torch.nn.Module) -> None:
    """
    Let the state dict of a sharded reference hold fingerprints in place of shards.

    TRL hashes the state dict to name its cache of log-probs, and can't read shards. Every process has to ask for it.
    """

    def fingerprint_shards(_: torch.nn.Module, state_dict: dict[str, Any], *__: Any) -> None:
        for name, tensor in state_dict.items():
            digest = bytearray.fromhex(fingerprint(full(tensor)))
            state_dict[name] = torch.frombuffer(digest, dtype=torch.uint8)

    reference.register_state_dict_post_hook(fingerprint_shards)


def seen_by_all(dataset: Dataset, folder: Path) -> Dataset:
    """
    A data set whose file every process sees, so that what one of them caches beside it is there for the others.

    A data set in memory, or in a cache on the disk of one machine, is written to a folder that all machines share.

    Args:
        dataset ([`~datasets.Dataset`]):
            The data set, the same in every process.
        folder (`Path`):
            Where to write it if it has to be, on a file system that all processes share.

    Returns:
        [`~datasets.Dataset`]: The same rows.

    Raises:
        [`HFTError`]: If there are several processes and datasets' caching is off, or they don't share the folder.
    """
    state = PartialState()
    if state.num_processes == 1 or not isinstance(dataset, Dataset):
        return dataset
    if not is_caching_enabled():
        raise HFTError(
            f"precompute_ref_log_probs is on in {state.num_processes} processes, which share the log-probs through datasets' "
            "cache, but caching is off: call datasets.enable_caching(), or use one process."
        )
    file = Path(dataset.cache_files[0]["filename"]) if dataset.cache_files else None
    if _all_see(file):
        return dataset
    if state.is_main_process:
        dataset.save_to_disk(str(folder))
    state.wait_for_everyone()
    if not _all_see(folder / DATASET_STATE_JSON_FILENAME):
        raise HFTError(
            f"precompute_ref_log_probs: not every process sees {str(folder)!r}: put output_dir on a file system that all "
            "machines share."
        )
    return load_from_disk(str(folder))


def _all_see(file: Path | None) -> bool:
    """Whether all processes mean the same file, on the same disk."""
    if len(set(gather_object([str(file)]))) > 1 or file is None:
        return False
    # Two machines may have files of one name, so a new one tells
    state, mark = PartialState(), [None]
    if state.is_main_process:
        with contextlib.suppress(OSError):
            mark = [tempfile.mkstemp(dir=file.parent)[1]]
    broadcast_object_list(mark)
    seen = gather_object([mark[0] is not None and Path(mark[0]).exists()])
    if state.is_main_process and mark[0] is not None:
        Path(mark[0]).unlink()
    return all(seen)
