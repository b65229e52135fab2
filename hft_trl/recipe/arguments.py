"""Define settings of recipes beyond TRL's configs and `HFTConfig`, and check their values."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Smallest and largest value of settings that transformers does not check
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


@dataclass
class RunArguments:
    """
    Define the settings of the whole run, which are the keys outside the sections.

    Args:
        output_dir (`str`): Folder of the run. Each stage gets a subfolder.
        method (`str`, *optional*, defaults to `"hft"`): Method of every stage, `"hft"` or `"fft"`.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace the results of earlier runs.
        evaluate (`str`, *optional*): Suites, such as `"general,knowledge"`. Default: the embedded model's probes.
    """

    output_dir: str
    method: Literal["hft", "fft"] = "hft"
    overwrite: bool = False
    evaluate: str | None = None

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise HFTError("output_dir is empty: give the folder of the run, such as runs/mine.")
        self.output_dir = str(Path(self.output_dir).expanduser())  # as the trainer's arguments do with theirs


@dataclass
class ModelArguments:
    """
    Define the start model of the first stage, with the names of TRL's `ModelConfig`.

    Args:
        model_name_or_path (`str`): Hub id, folder, `"demo"` (embedded) or `"smollm2"`.
        model_revision (`str`, *optional*, defaults to `"main"`): Branch, tag or commit on the hub.
        dtype (`str`, *optional*, defaults to `"float32"`): Type of the weights. HFT rejects one that rounds them.
        attn_implementation (`str`, *optional*): Attention implementation.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether code from the hub may run.
        chat_template (`str`, *optional*): `"tulu"` or a `.jinja` file. By default the tokenizer's, else Tülu's.
    """

    model_name_or_path: str
    model_revision: str = "main"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None

    def __post_init__(self) -> None:
        self.model_name_or_path = at_home(self.model_name_or_path)
        self.chat_template = at_home(self.chat_template) if self.chat_template else None


@dataclass
class DataArguments:
    """
    Define the keys of a stage's section in addition to those of its TRL config.

    Args:
        dataset (`str`, *optional*): Hub id, folder, file or `"demo"`. Without it, TRL's mixture `datasets` is used.
        dataset_config (`str`, *optional*): Configuration on the hub.
        split (`str`, *optional*, defaults to `"train"`): Split to train on, or a part such as `"train[:1000]"`.
        eval_split (`str`, *optional*): Split to evaluate on when `eval_strategy` is set.
        method (`str`, *optional*): This stage's method, if it differs from the run's.
        drop_equal_pairs (`bool`, *optional*, defaults to `False`): Whether to drop equal pairs, not reject them.
        reference_quantization (`str`, *optional*): `"8bit"` or `"4bit"`, which rounds the log-probabilities.
    """

    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    eval_split: str | None = None
    method: Literal["hft", "fft"] | None = None
    drop_equal_pairs: bool = False
    reference_quantization: Literal["8bit", "4bit"] | None = None

    def __post_init__(self) -> None:
        self.dataset = at_home(self.dataset) if self.dataset else None


@dataclass
class StageArguments(HFTConfig):
    """
    Extend [`HFTConfig`] with the flags that single-stage recipes add to those of TRL's scripts.

    The other fields are described in [`ModelArguments`], [`DataArguments`] and [`RunArguments`].

    Args:
        hft_seed (`int`, *optional*): Seed of the selection. By default the trainer's `seed`.
    """

    seed: int = field(init=False, default=42)
    hft_seed: int | None = None
    chat_template: str | None = None
    drop_equal_pairs: bool = False
    reference_quantization: Literal["8bit", "4bit"] | None = None
    overwrite: bool = False

    def config(self, seed: int) -> HFTConfig:
        """Return the settings of HFT, with the trainer's `seed` unless `hft_seed` is set."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(HFTConfig)}
        return HFTConfig(**{**values, "seed": seed if self.hft_seed is None else self.hft_seed})


def at_home(path: str) -> str:
    """Expand a leading `~`. Hub ids and other paths are returned unchanged."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def check_numbers(prefix: str, given: Mapping[str, Any]) -> None:
    """Reject numbers with which training would fail late or never end, in a section such as `"sft."`."""
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise HFTError(f"{prefix}{name} is {value}: it must be a finite number.")
        low, high = BOUNDS.get(name, (None, None))
        if isinstance(value, int | float) and low is not None and not low <= value <= high:
            raise HFTError(f"{prefix}{name} is {value:.6g}: it must be from {low} to {high:.6g}.")


def tokens_to_environment(args: "TrainingArguments") -> None:
    """Move the hub's token from a trainer's arguments to `HF_TOKEN`, where huggingface_hub looks for it."""
    # Otherwise it would be saved: checkpoints contain the arguments, and trackers log them
    found = {}
    if args.hub_token:
        found["hub_token"] = args.hub_token
        args.hub_token = None
    if args.model_init_kwargs:
        kept = dict(args.model_init_kwargs)
        for name in ("token", "use_auth_token"):
            if isinstance(kept.get(name), str):
                found[f"model_init_kwargs.{name}"] = kept.pop(name)
        args.model_init_kwargs = kept
    if len(set(found.values())) > 1:
        raise HFTError(f"{' and '.join(found)} are two different tokens: give one that may read and write.")
    if found:
        os.environ["HF_TOKEN"] = next(iter(found.values()))
