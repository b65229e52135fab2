"""Trainers on tiny models, as tests and the processes that they start build them."""

from pathlib import Path

import conftest
import torch
from safetensors.torch import load_file
from trl import DPOConfig, KTOTrainer, SFTConfig

from hft_trl import HFTDPOTrainer, HFTMixin, HFTSFTTrainer, ResumableMixin
from hft_trl.chat import load_tokenizer
from hft_trl.recipe.rows import preference_dataset, sft_dataset

QUIET = {**conftest.QUIET, "learning_rate": 1e-2}


def sft_trainer(kind, model, tulu, folder, hft=None, **settings):
    args = SFTConfig(str(folder), **{**QUIET, "assistant_only_loss": True, **settings})
    extra = {"hft_config": hft} if hft is not None else {}
    tokenizer = load_tokenizer(str(model) if isinstance(model, str | Path) else model.config._name_or_path)
    model, rows = str(model) if isinstance(model, Path) else model, sft_dataset(tulu, "tulu")
    extra |= {"eval_dataset": rows} if args.eval_strategy != "no" else {}
    return kind(model=model, args=args, train_dataset=rows, processing_class=tokenizer, **extra)


def dpo_trainer(kind, model, prefs, folder, hft=None, ref_model=None, eval_rows=None, **settings):
    args = DPOConfig(str(folder), **{**QUIET, **settings})
    extra = {"hft_config": hft} if hft is not None else {}
    tokenizer = load_tokenizer(str(model) if isinstance(model, str | Path) else model.config._name_or_path)
    return kind(
        model=str(model) if isinstance(model, Path) else model,
        ref_model=ref_model,
        args=args,
        train_dataset=preference_dataset(prefs, "prefs"),
        eval_dataset=preference_dataset(prefs.select(range(eval_rows)), "prefs") if eval_rows else None,
        processing_class=tokenizer,
        **extra,
    )


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


class ResumableSFTTrainer(ResumableMixin, HFTSFTTrainer):
    """SFT with exact resume, as recipes build it."""


class ResumableDPOTrainer(ResumableMixin, HFTDPOTrainer):
    """DPO with exact resume, as recipes build it."""


class HFTKTOTrainer(HFTMixin, KTOTrainer):
    """What a user writes to give another TRL trainer a half."""
