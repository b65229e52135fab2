"""Check, load, train or resume, and measure a stage of a recipe."""

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging
from trl import DatasetMixtureConfig, DPOConfig, KTOConfig, SFTConfig
from trl.data_utils import is_conversational

from hft_trl import chat, demo
from hft_trl.checkpoints import moving_reference
from hft_trl.checkpoints.resumable import ResumableMixin
from hft_trl.checkpoints.whole import last_whole_checkpoint
from hft_trl.config import HFTConfig
from hft_trl.errors import MISTAKES, HFTError, explained
from hft_trl.files import writing
from hft_trl.recipe import folder
from hft_trl.recipe.arguments import DataArguments, ModelArguments, RetentionArguments, tokens_to_environment
from hft_trl.recipe.endings import settle_generation
from hft_trl.recipe.loading import (
    check_apart,
    check_quantizable,
    load_mixture,
    load_quantized,
    load_split,
    part_of_mixture,
)
from hft_trl.recipe.measure import measure, movements, parameter_counts, reset_peak_memory
from hft_trl.recipe.rows import preference_dataset, sft_dataset, untrained_rows
from hft_trl.report import StageRecord
from hft_trl.retention.callback import RetentionCallback
from hft_trl.retention.meter import BASE_FILE, Meter
from hft_trl.retention.retention_rows import read_texts
from hft_trl.saved_models.digests import part_files
from hft_trl.selection import find_units
from hft_trl.trainers.calibration import source_rows
from hft_trl.trainers.compatibility import check
from hft_trl.trainers.mixin import HFTMixin
from hft_trl.weights import weight_files

logger = logging.get_logger(__name__)

LARGE = 20_000  # rows from which several processes prepare the data


@dataclasses.dataclass
class Stage:
    """Store one stage of training, and reject settings that contradict each other."""

    name: str  # in its recipe, such as "sft", or of the round
    model: ModelArguments  # that it starts from
    data: DataArguments
    args: TrainingArguments  # of TRL's trainer, such as SFTConfig
    hft: HFTConfig | None  # `None` for an adapter
    mixture: DatasetMixtureConfig | None = None  # of data sets, instead of `data.dataset`
    base: ModelArguments | None = None  # the start model of the run's first stage, if it is another model
    auto_checkpointing: bool = False  # whether the recipe chooses the activation checkpointing
    retention: RetentionArguments | None = None  # what to measure of what the model keeps
    first_folder: Path | None = None  # of the run's first stage, by default its own
    train_dataset: Dataset | None = None  # after `load_data`
    eval_dataset: Dataset | None = None
    truncated_rows: int | None = None  # from the left, where `load_data` counts them

    def __post_init__(self) -> None:
        args = self.args
        moving_reference.check(args)
        if not self.data.dataset and self.mixture is None:
            raise HFTError(f"{self.name}.dataset is missing: set it in the file, or with --{self.name}.dataset.")
        if self.data.dataset and self.mixture is not None:
            raise HFTError(
                f"{self.name} has a dataset, {self.data.dataset!r}, and datasets, a mixture: leave one of them out."
            )
        if self.mixture is not None:
            parts = [part_of_mixture(part) for part in self.mixture.datasets]
            self.mixture = dataclasses.replace(self.mixture, datasets=parts)
        self.model = dataclasses.replace(self.model, model_name_or_path=demo.model_path(self.model.model_name_or_path))
        if self.data.dataset == "demo":
            rows = demo.SFT_DATA if isinstance(args, SFTConfig) else demo.DPO_DATA
            self.data = dataclasses.replace(self.data, dataset=str(rows))
        start = (self.base or self.model).model_name_or_path
        if self.hft is not None and self.hft.calibrated == "wanda" and start == str(demo.MODEL):
            self.hft = dataclasses.replace(self.hft, source_texts=self.hft.source_texts or "demo")
        args.trust_remote_code = self.model.trust_remote_code
        tokens_to_environment(args)
        args.model_init_kwargs = {
            "revision": self.model.model_revision,
            "dtype": self.model.dtype,
            "attn_implementation": self.model.attn_implementation,
            **(args.model_init_kwargs or {}),
        }
        # Here, so that a mistake in a later stage is found before the first one trains
        check(args, self.hft or HFTConfig(method="fft"))
        # The trainer counts these itself and restores the count on resume. One that generates needs no setting for it,
        # and with one would warn in every step.
        if args.include_num_input_tokens_seen == "no" and "num_generations" not in vars(args):
            args.include_num_input_tokens_seen = "non_padding"

    @property
    def section(self) -> str:
        """Return the section of its arguments: `"sft"` for a round of continual learning, else its name."""
        return self.name

    @property
    def kind(self) -> str | None:
        """Return `"sft"` or `"dpo"`, whatever its name, and `None` for the config of another trainer."""
        return "sft" if isinstance(self.args, SFTConfig) else "dpo" if isinstance(self.args, DPOConfig) else None

    def count(self, dataset: Dataset) -> int:
        """Return how many rows a trainer makes of a data set: KTO splits each pair into two."""
        return len(dataset) * (2 if isinstance(self.args, KTOConfig) else 1)

    @property
    def folder(self) -> Path:
        """Return the folder of the stage's model."""
        return Path(self.args.output_dir)

    @property
    def source(self) -> str:
        """Return the name of the data set in errors."""
        return self.data.dataset or "the mixture"

    @property
    def data_names(self) -> list[str]:
        """Return the names of its data sets, of a mixture's local files their folder if there are several."""
        if self.mixture is None:
            return [self.data.dataset]
        names: list[str] = []
        for part in self.mixture.datasets:
            files = part_files(part)  # the part's `path` may be just `json`
            places = files if len(files) == 1 else {file.parent for file in files}
            names += sorted(map(str, places or [part.path]))
        return names

    def check(self) -> None:
        """Check the start model, source texts and quantized reference before anything is loaded."""
        start = self.base or self.model
        structure = start.structure()
        if self.base is None and Path(start.model_name_or_path).is_dir():
            weight_files(start.model_name_or_path)  # for its checks
        if self.hft is not None:
            find_units(structure, self.hft.exclude if self.hft.method == "hft" else ())
            if self.hft.calibrated == "wanda":
                read_texts(source_rows(self.hft))
        if self.data.reference_quantization is not None:
            check_quantizable(self.data.reference_quantization, self.args)

    def load_data(self) -> None:
        """Load and check the training rows, and the evaluation rows if an `eval_strategy` is set."""
        args, evaluates = self.args, self.args.eval_strategy != "no"
        if evaluates and not self.data.eval_split:
            raise HFTError(
                f"{self.name}: eval_strategy is {str(args.eval_strategy.value)!r} but there is no eval_split to "
                "evaluate on: set eval_split, or eval_strategy to 'no'."
            )
        if evaluates and self.mixture is None:
            check_apart(self.data.dataset, self.data.split, self.data.eval_split, self.data.dataset_config)
        elif evaluates and self.data.eval_split == self.data.split:
            raise HFTError(
                f"{self.name}: split and eval_split of the mixture are both {self.data.split!r}, and the model would "
                "be evaluated on what it learns: set test_split_size, and eval_split to 'test'."
            )
        self.train_dataset = self._load_split(self.data.split)
        self.eval_dataset = self._load_split(self.data.eval_split) if evaluates else None
        if isinstance(args, SFTConfig):
            args.assistant_only_loss = args.assistant_only_loss and is_conversational(self.train_dataset[0])
        # Trainers that generate do not prepare rows, and have no such setting
        if vars(args).get("dataset_num_proc", 1) is None and len(self.train_dataset) >= LARGE:
            # Faster, and the memory-mapped files that a worker has read count as resident only until it ends
            args.dataset_num_proc = min(max(os.cpu_count() or 1, 4), 16)

    def _load_split(self, split: str) -> Dataset:
        name = f"{self.source}, split {split}"
        if self.mixture is not None:
            dataset = load_mixture(self.mixture, split)
        else:
            dataset = load_split(self.data.dataset, split, self.data.dataset_config)
        if isinstance(self.args, SFTConfig):
            return sft_dataset(dataset, name, self.args.dataset_text_field)
        return preference_dataset(dataset, name, self.data.drop_equal_pairs)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the start model, with the chat template."""
        model = self.model
        tokenizer = chat.load_tokenizer(model.model_name_or_path, None, model.model_revision, model.trust_remote_code)
        self.set_template(tokenizer)
        return tokenizer

    def set_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give a tokenizer the stage's chat template, with marks where only answers are learned."""
        # TRL's flag, and ours
        chat.set_template(tokenizer, vars(self.args).get("chat_template_path") or self.model.chat_template)
        if isinstance(self.args, SFTConfig) and self.args.assistant_only_loss:
            chat.mark_answers(tokenizer)

    def load_reference(self) -> PreTrainedModel | None:
        """Load a quantized reference, or return `None` if the trainer makes the reference from the policy."""
        if self.data.reference_quantization is None:
            return None
        return load_quantized(self.model.model_name_or_path, self.data.reference_quantization, self.args)

    def meter(self) -> Meter:
        """Return what measures the section `retention`, and check its rows."""
        rows = {name: value for name, value in self.retention.settings().items() if name != "every"}
        return Meter(self.load_tokenizer(), **rows)

    def sources(self) -> set[Path]:
        """Return the folders of the earlier stages that it starts from."""
        return {Path(self.model.model_name_or_path)}

    def check_saved(self) -> None:
        """Reject a finished stage whose weights are missing or incomplete."""
        weight_files(str(self.folder))

    def own_settings(self) -> dict[str, dict[str, Any]]:
        """Return the settings of a subclass, by section, that the trained weights depend on."""
        return {}

    def finished(self) -> bool:
        """Return whether an earlier run finished the stage."""
        return folder.finished(self) is not None

    def train(self, trainer: ResumableMixin) -> StageRecord:
        """Train or resume, save the model, mark the folder as finished, and return the measurements."""
        if not isinstance(trainer, ResumableMixin):
            kind = type(trainer).__name__
            raise HFTError(
                f"{self.name}: the trainer is a {kind}, whose checkpoints may be incomplete after a kill: put "
                f"ResumableMixin before its other bases (class Resumable{kind}(ResumableMixin, {kind}): ...)."
            )
        model, rows = trainer.accelerator.unwrap_model(trainer.model), self.count(self.train_dataset)
        # Neither is in the arguments of every trainer
        longest, packing = (vars(self.args).get(name) for name in ("max_length", "packing"))
        dropped = untrained_rows(rows, trainer.train_dataset, self.source, longest, packing)
        if dropped:
            logger.warning(f"{dropped} of {rows} rows have no token to train on within max_length {longest}.")
        folder.mark_started(self)
        settle_generation(model, trainer.processing_class, trainer.train_dataset)
        checkpoint = last_whole_checkpoint(self.folder)
        # Read before training, which may delete the checkpoint
        resumed_from = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)) if checkpoint else None
        reset_peak_memory()
        chat.check_ids(trainer.train_dataset, trainer.processing_class, model.config, self.model.model_name_or_path)
        trained, total = parameter_counts(trainer)
        trainer.accelerator.print(
            f"\n== {self.name}: {'an adapter' if self.hft is None else self.hft.method.upper()}, {trained:,} of "
            f"{total:,} parameters learn ({trained / total:.1%}), "
            f"{f'resumes at step {resumed_from.global_step}' if resumed_from else 'starts at step 0'} =="
        )
        # In each upload to the hub too, whose card the trainer writes
        trainer.create_model_card = partial(trainer.create_model_card, dataset_name=self.data_names)
        self._train(trainer, checkpoint)
        record = measure(self, trainer, resumed_from)
        record.rows, record.dropped_rows, record.truncated_rows = rows - dropped, dropped, self.truncated_rows
        with writing(self.folder):
            trainer.save_model()
            trainer.save_state()
            trainer.create_model_card()
            PartialState().wait_for_everyone()  # until the main process has saved
            if isinstance(trainer, HFTMixin):
                record.moved = movements(self, trainer.hft_selection)
            if PartialState().is_main_process:
                folder.mark_finished(self, record)
        PartialState().wait_for_everyone()
        return record

    def _train(self, trainer: ResumableMixin, checkpoint: str | None) -> None:
        first = _FirstStep()
        trainer.add_callback(first)
        if self.retention is not None:
            # In all stages against the run's base
            base = self.first_folder / BASE_FILE if self.first_folder not in (None, self.folder) else None
            trainer.add_callback(RetentionCallback(**self.retention.settings(), base=base))
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except MISTAKES as error:
            if first.begun or isinstance(error, HFTError):
                raise
            raise HFTError(f"{self.name}: training cannot begin: {explained(error)}.") from error


class _FirstStep(TrainerCallback):
    """Record whether a step has begun: earlier errors come from settings, later ones may be bugs."""

    begun = False

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = True
