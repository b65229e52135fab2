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
    **dict.fromkeys(("every", "retention_every"), (1, 2**31)),
    **dict.fromkeys(("max_rows", "retention_max_rows"), (0, 2**31)),
}


@dataclass
class RunArguments:
    """Define the settings of the whole run, which are the keys outside the sections."""

    output_dir: str  # each stage gets a subfolder
    method: Literal["hft", "fft"] = "hft"  # of every stage
    overwrite: bool = False  # whether to replace the results of earlier runs
    evaluate: str | None = None  # suites, such as "general,knowledge"; by default the embedded model's probes

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise HFTError("output_dir is empty: give the folder of the run, such as runs/mine.")
        self.output_dir = str(Path(self.output_dir).expanduser())  # as the trainer's arguments do with theirs


@dataclass
class ModelArguments:
    """Define the start model of the first stage, with the names of TRL's `ModelConfig`."""

    model_name_or_path: str  # hub id, folder, "demo" for the embedded model, or "smollm2"
    model_revision: str = "main"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "float32"  # HFT rejects one that rounds the weights
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None  # "tulu" or a .jinja file; by default the tokenizer's, else Tülu's

    def __post_init__(self) -> None:
        self.model_name_or_path = at_home(self.model_name_or_path)
        self.chat_template = at_home(self.chat_template) if self.chat_template else None


@dataclass
class DataArguments:
    """Define the keys of a stage's section in addition to those of its TRL config."""

    dataset: str | None = None  # hub id, folder, file or "demo"; without it, TRL's mixture `datasets` is used
    dataset_config: str | None = None  # on the hub
    split: str = "train"  # or a part, such as "train[:1000]"
    eval_split: str | None = None  # used when `eval_strategy` is set
    method: Literal["hft", "fft"] | None = None  # if it differs from the run's
    drop_equal_pairs: bool = False  # instead of rejecting them
    reference_quantization: Literal["8bit", "4bit"] | None = None  # rounds the log-probabilities

    def __post_init__(self) -> None:
        self.dataset = at_home(self.dataset) if self.dataset else None


@dataclass
class RetentionArguments:
    """Define the section `retention`: what is measured in every stage, see [`RetentionCallback`]."""

    texts: str | None = None  # text file, or `.jsonl` file with a `text` in each row
    facts: str | None = None  # `.jsonl` file with `text`, `answer` and `others` in each row
    prompts: str | None = None  # `.jsonl` file with `messages` or a `prompt` in each row
    every: int | None = None  # steps between measurements, by default only the start, evaluations and the end
    max_rows: int = 128  # largest number of texts, facts and prompts; 0 measures nothing

    def __post_init__(self) -> None:
        self.texts, self.facts, self.prompts = (path and at_home(path) for path in self.files())

    def files(self) -> tuple[str | None, str | None, str | None]:
        """Return the files of texts, facts and prompts."""
        return self.texts, self.facts, self.prompts


@dataclass
class StageArguments(HFTConfig):
    """Extend [`HFTConfig`] with the flags that single-stage recipes add to those of TRL's scripts."""

    seed: int = field(init=False, default=42)
    hft_seed: int | None = None  # of the selection; by default the trainer's seed
    chat_template: str | None = None
    drop_equal_pairs: bool = False
    reference_quantization: Literal["8bit", "4bit"] | None = None
    overwrite: bool = False
    retention_texts: str | None = None
    retention_facts: str | None = None
    retention_prompts: str | None = None
    retention_every: int | None = None
    retention_max_rows: int = 128

    def retention(self) -> RetentionArguments:
        """Return the settings that begin with `retention_`."""
        return RetentionArguments(
            **{entry.name: vars(self)[f"retention_{entry.name}"] for entry in fields(RetentionArguments)}
        )

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
    found, kept = {}, dict(args.model_init_kwargs or {})
    if args.hub_token:
        found["hub_token"], args.hub_token = args.hub_token, None
    if isinstance(kept.get("token"), str):
        found["model_init_kwargs.token"] = kept.pop("token")
        args.model_init_kwargs = kept
    if len(set(found.values())) > 1:
        raise HFTError(f"{' and '.join(found)} are two different tokens: give one that may read and write.")
    for token in found.values():
        os.environ["HF_TOKEN"] = token
