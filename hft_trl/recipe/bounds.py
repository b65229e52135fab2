"""Bounds of settings that are numbers."""

import math
from collections.abc import Mapping
from typing import Any

from hft_trl.errors import HFTError

# Smallest and largest value of settings that transformers does not check when they are set
BOUNDS = {
    **dict.fromkeys(("seed", "data_seed", "hft_seed"), (0, 2**32 - 1)),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, 2**20)),
    **dict.fromkeys(("gradient_accumulation_steps", "max_length", "dataset_num_proc"), (1, 2**31)),
    "max_steps": (-1, 2**31),
    "dataloader_num_workers": (0, 2**16),
    "num_train_epochs": (0, 2**31),
    "learning_rate": (0, 1e6),
    "weight_decay": (0, 1e6),
    "max_grad_norm": (0, 1e12),
    "save_total_limit": (1, 2**31),
}


def check_numbers(prefix: str, given: Mapping[str, Any]) -> None:
    """
    Reject numbers with which training would fail late, or never end.

    Args:
        prefix (`str`):
            What stands before a setting's name in errors, such as `"sft."`.
        given (`Mapping[str, Any]`):
            The settings that the user gave, by name.

    Raises:
        [`HFTError`]: Naming the setting, its value and the bounds.
    """
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise HFTError(f"{prefix}{name} is {value}: it must be a finite number.")
        low, high = BOUNDS.get(name, (None, None))
        if isinstance(value, int | float) and low is not None and not low <= value <= high:
            raise HFTError(f"{prefix}{name} is {value:.6g}: it must be from {low} to {high:.6g}.")
