"""Define settings of recipes beyond TRL's configs and `HFTConfig`, and check their values."""

import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, TrainingArguments

from hft_trl import demo
from hft_trl.config import HFTConfig
from hft_trl.demo.probes import probe_rows
from hft_trl.errors import HFTError
from hft_trl.saved_models.digests import content_digest
from hft_trl.skeleton import build_on_meta

# Smallest value of settings that transformers does not check. The largest is that of a seed.
LEAST = {
    **dict.fromkeys(("seed", "data_seed", "hft_seed", "dataloader_num_workers", "num_train_epochs"), 0),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "max_rows", "retention_max_rows"), 0),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("max_length", "dataset_num_proc", "save_total_limit", "every", "retention_every"), 1),
    "max_steps": -1,
}
LARGEST = 2**32 - 1


def key(text: str, default: Any = MISSING) -> Any:
    """Return a field with its text for `--help`."""
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"help": text})


EQUAL_PAIRS = "Drop pairs with equal sides instead of rejecting them."
QUANTIZATION = "Hold the reference in 8 or 4 bits, which rounds the log-probabilities."
TEMPLATE = "tulu or a .jinja file, by default the tokenizer's own, or Tülu's if it has none."
TEXTS = "Text file, or .jsonl file with a text in each row."
FACTS = "File of .jsonl rows with text, answer and others."
PROMPTS = "File of .jsonl rows with messages or a prompt."
EVERY = "Steps between measurements, by default only the start, evaluations and the end."
MAX_ROWS = "Largest number of texts, facts and prompts; 0 measures nothing."
DEMO_EVERY = 60  # steps of the embedded model: a measurement takes as long as three of them


@dataclass
class RunArguments:
    """Define the settings of the whole run, which are the keys outside the sections."""

    output_dir: str = key("Folder of the run; each stage gets a subfolder.")
    method: Literal["hft", "fft"] = key("Train half of the layers (hft) or all (fft) in every stage.", "hft")
    overwrite: bool = key("Replace the results of earlier runs.", False)
    evaluate: str | None = key("Suites to evaluate at the end, such as general,knowledge.", None)

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise HFTError("output_dir is empty: give the folder of the run, such as runs/mine.")


@dataclass
class ModelArguments:
    """Define the start model of the first stage, with the names of TRL's `ModelConfig`."""

    model_name_or_path: str = key("Hub id, folder, demo (the embedded model) or smollm2.")
    model_revision: str = key("Branch, tag or commit on the hub.", "main")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = key(
        "Type of the weights; HFT rejects one that rounds them.", "float32"
    )
    attn_implementation: str | None = key("Attention, such as sdpa or flash_attention_2.", None)
    trust_remote_code: bool = key("Run code of the model's repository.", False)
    chat_template: str | None = key(TEMPLATE, None)

    @property
    def address(self) -> str:
        """Return the folder, or the hub id with its revision, `id@revision`, unless this is main."""
        return demo.address(self.model_name_or_path, self.model_revision)

    def structure(self) -> PreTrainedModel:
        """Build the model on the meta device, from its config alone."""
        return build_on_meta(self.model_name_or_path, self.model_revision, self.trust_remote_code)


@dataclass
class DataArguments:
    """Define the keys of a stage's section in addition to those of its TRL config."""

    dataset: str | None = key("Hub id, folder, file or demo; or set datasets, TRL's mixture.", None)
    dataset_config: str | None = key("Configuration of the data set on the hub.", None)
    split: str = key("Split to train on, or a part such as train[:1000].", "train")
    eval_split: str | None = key("Split to evaluate on if eval_strategy is set.", None)
    method: Literal["hft", "fft"] | None = key("Method of this stage, by default the run's.", None)
    drop_equal_pairs: bool = key(EQUAL_PAIRS, False)
    reference_quantization: Literal["8bit", "4bit"] | None = key(QUANTIZATION, None)


@dataclass
class RetentionArguments:
    """Define the section `retention`: what is measured in every stage, see [`RetentionCallback`]."""

    texts: str | None = key(TEXTS, None)
    facts: str | None = key(FACTS, None)
    prompts: str | None = key(PROMPTS, None)
    every: int | None = key(EVERY, None)
    max_rows: int = key(MAX_ROWS, 128)

    def of_model(self, model: ModelArguments) -> "RetentionArguments | None":
        """Return what to measure, `None` for nothing. Without files only the embedded model has rows."""
        if self.max_rows == 0:
            return None
        if self.texts or self.facts or self.prompts or model.model_name_or_path == "demo":
            return self
        if self != RetentionArguments():
            raise HFTError("retention has no texts, facts or prompts: give at least one file, or remove the section.")
        return None

    def settings(self) -> dict[str, Any]:
        """Return the arguments of [`RetentionCallback`]: the files, or the rows of the embedded model."""
        if self.texts or self.facts or self.prompts:
            return vars(self)
        rows = probe_rows("retention")
        columns = {f"{kind}s": [row[kind] for row in rows] for kind in ("text", "fact", "prompt")}
        return {**columns, "every": self.every or DEMO_EVERY, "max_rows": self.max_rows}

    def digests(self) -> dict[str, Any]:
        """Return what the figures depend on: a digest of each kind of rows, and how many rows are measured."""
        rows = {name: value for name, value in self.settings().items() if value and name not in ("every", "max_rows")}
        return {"max_rows": self.max_rows} | {
            f"{name}_content": content_digest(Path(value)) if isinstance(value, str) else "demo"
            for name, value in rows.items()
        }


@dataclass
class StageArguments(HFTConfig):
    """Extend [`HFTConfig`] with the flags that single-stage recipes add to those of TRL's scripts."""

    seed: int = field(init=False, default=42)
    hft_seed: int | None = key("Seed of the selection, by default that of the trainer.", None)
    chat_template: str | None = key(TEMPLATE, None)
    drop_equal_pairs: bool = key(EQUAL_PAIRS, False)
    reference_quantization: Literal["8bit", "4bit"] | None = key(QUANTIZATION, None)
    overwrite: bool = key("Replace the results of an earlier run.", False)
    retention_texts: str | None = key(TEXTS, None)
    retention_facts: str | None = key(FACTS, None)
    retention_prompts: str | None = key(PROMPTS, None)
    retention_every: int | None = key(EVERY, None)
    retention_max_rows: int = key(MAX_ROWS, 128)


def check_values(prefix: str, given: Mapping[str, Any]) -> None:
    """Reject values with which training would fail late or never end, in a section such as `"sft."`."""
    for name, value in given.items():
        if name.endswith("_kwargs") and isinstance(value, str) and not value.startswith("{"):
            raise HFTError(f"{prefix}{name} is {value!r}: give keys and values, such as '{{\"key\": true}}'.")
        if isinstance(value, float) and not math.isfinite(value):
            raise HFTError(f"{prefix}{name} is {value}: it must be a finite number.")
        if name in LEAST and isinstance(value, int | float) and not LEAST[name] <= value <= LARGEST:
            raise HFTError(f"{prefix}{name} is {value:.6g}: it must be from {LEAST[name]} to {LARGEST}.")


def tokens_to_environment(args: TrainingArguments) -> None:
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
