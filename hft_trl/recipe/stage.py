"""One stage of a recipe: checked, loaded, trained from where its folder stands, and measured."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging
from trl import DatasetMixtureConfig, SFTConfig
from trl.data_utils import is_conversational

from hft_trl import chat, demo
from hft_trl.checkpoints.resumable import ResumableMixin
from hft_trl.checkpoints.whole import last_whole_checkpoint
from hft_trl.config import HFTConfig
from hft_trl.errors import MISTAKES, HFTError, explained
from hft_trl.files import writing
from hft_trl.frozen import replicated
from hft_trl.recipe import folder
from hft_trl.recipe.arguments import Adapter, DataArguments, ModelArguments
from hft_trl.recipe.data import check_apart, load_mixture, load_split
from hft_trl.recipe.endings import settle_generation
from hft_trl.recipe.hub_token import tokens_to_environment
from hft_trl.recipe.measure import measure, movements, reset_peak_memory
from hft_trl.recipe.rows import preference_dataset, sft_dataset, untrained_rows
from hft_trl.recipe.start_model import check_model
from hft_trl.reference.quantized import check_quantizable, load_quantized
from hft_trl.report import StageRecord
from hft_trl.skeleton import build_on_meta
from hft_trl.trainers.compatibility import check_choice, check_settings

logger = logging.get_logger(__name__)

LARGE = 20_000  # rows


@dataclasses.dataclass
class Stage:
    """
    One stage of training.

    Attributes:
        name (`str`): Name of the stage in its recipe, such as `"sft"`, or of the round.
        model ([`ModelArguments`]): What it starts from.
        data ([`DataArguments`]): What it learns from.
        args ([`~transformers.TrainingArguments`]): The trainer's arguments, such as [`~trl.SFTConfig`].
        hft ([`HFTConfig`], *optional*): What to train; `None` where it is an adapter.
        mixture ([`~trl.DatasetMixtureConfig`], *optional*): TRL's mixture of data sets, instead of `data.dataset`.
        base ([`ModelArguments`], *optional*): What the first stage of the run starts from, if it is another model.
        memory (`Path`, *optional*): File of rows of earlier tasks, which a round of GEM must not unlearn.
        adapter ([`Adapter`], *optional*): The adapter to train.
        auto_checkpointing (`bool`): Whether the recipe decides how much is computed again
            ([`~hft_trl.recipe.activation_checkpointing.settle_checkpointing`]).
        train_dataset, eval_dataset ([`~datasets.Dataset`], *optional*): The rows, once [`~Stage.load_data`] was called.
    """

    name: str
    model: ModelArguments
    data: DataArguments
    args: TrainingArguments
    hft: HFTConfig | None
    mixture: DatasetMixtureConfig | None = None
    base: ModelArguments | None = None
    memory: Path | None = None
    adapter: Adapter | None = None
    auto_checkpointing: bool = False
    train_dataset: Dataset | None = None
    eval_dataset: Dataset | None = None

    @property
    def section(self) -> str:
        """The section that its arguments stand in: its name, and `"sft"` for a round of continual learning."""
        return "sft" if isinstance(self.args, SFTConfig) else self.name

    @property
    def folder(self) -> Path:
        """Where the stage's model is saved."""
        return Path(self.args.output_dir)

    @property
    def source(self) -> str:
        """What errors call the data set."""
        return self.data.dataset or "the mixture"

    def check(self) -> None:
        """
        Check the model that the run starts from, and whether the stage can have the reference that its settings ask for.

        Raises:
            [`HFTError`]: See [`~hft_trl.recipe.start_model.check_model`] and
                [`~hft_trl.reference.quantized.check_quantizable`].
        """
        start = self.base or self.model
        if self.base is None:
            check_model(start, self.args, self.hft)
        if self.data.reference_quantization is not None:
            structure = build_on_meta(start.model_name_or_path, start.model_revision, start.trust_remote_code)
            check_quantizable(self.data.reference_quantization, self.args, structure)

    def load_data(self) -> None:
        """
        Load and check the rows to train on, and those to evaluate on if there is an `eval_strategy`.

        The loss is restricted to the assistant's tokens only where the data are conversations. Large data are prepared by
        several processes unless `dataset_num_proc` says otherwise.

        Raises:
            [`HFTError`]: Naming what is missing or the first row that can't be trained on.
        """
        args, evaluates = self.args, self.args.eval_strategy != "no"
        if evaluates and not self.data.eval_split:
            raise HFTError(
                f"{self.name}: eval_strategy is {str(args.eval_strategy.value)!r} but there is no eval_split to evaluate on: "
                "set eval_split, or eval_strategy to 'no'."
            )
        if evaluates and self.mixture is None:
            check_apart(self.data.dataset, self.data.split, self.data.eval_split)
        self.train_dataset = self._load_split(self.data.split)
        self.eval_dataset = self._load_split(self.data.eval_split) if evaluates else None
        if isinstance(args, SFTConfig):
            args.assistant_only_loss = args.assistant_only_loss and is_conversational(self.train_dataset[0])
        if args.dataset_num_proc is None and len(self.train_dataset) >= LARGE:
            # Faster, and memory-mapped files that a pass has read count as resident until the process lets go of them.
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

    def load_tokenizer(self, of_base: bool = False) -> PreTrainedTokenizerBase:
        """
        Load the tokenizer of the start model, with a chat template that suits the stage.

        Args:
            of_base (`bool`, *optional*, defaults to `False`):
                Whether to load that of the run's first start model, where the stage's own is not trained yet.

        Raises:
            [`HFTError`]: If there is no tokenizer, no such template, or no way to tell the assistant's tokens apart.
        """
        model = (self.base or self.model) if of_base else self.model
        template, sft = model.chat_template, isinstance(self.args, SFTConfig)
        if sft and self.args.chat_template_path is not None:
            template = _trl_template(self.args.chat_template_path, template)
        tokenizer = chat.load_tokenizer(
            model.model_name_or_path, template, model.model_revision, model.trust_remote_code
        )
        if sft and self.args.assistant_only_loss:
            chat.check_answers_marked(tokenizer)
        return tokenizer

    def load_reference(self) -> PreTrainedModel | None:
        """The reference if it is a quantised one, otherwise `None`: then the trainer makes it of the policy."""
        if self.data.reference_quantization is None:
            return None
        return load_quantized(self.model.model_name_or_path, self.data.reference_quantization, self.args)

    def finished(self) -> bool:
        """Whether an earlier run finished the stage."""
        return folder.finished(self) is not None

    def train(
        self, trainer: ResumableMixin, rows: int | None = None, truncated_rows: int | None = None
    ) -> StageRecord:
        """
        Train from where the folder stands, save the model, and mark the folder as finished.

        Args:
            trainer ([`ResumableMixin`]):
                The stage's trainer.
            rows (`int`, *optional*):
                Rows of the data set that the trainer was given, by default those of `train_dataset`.
            truncated_rows (`int`, *optional*):
                Rows that were cut to fit, where they were counted.

        Returns:
            [`StageRecord`]: What the stage measured.

        Raises:
            [`HFTError`]: If no row has a token to train on, if the last checkpoint has another selection, or if the loss
                diverges.
        """
        args, model = self.args, trainer.accelerator.unwrap_model(trainer.model)
        rows = len(self.train_dataset) if rows is None else rows
        packing = isinstance(args, SFTConfig) and args.packing
        longest = vars(args).get("max_length")  # not every trainer's arguments have one
        # KTO makes two rows of each pair
        dropped = max(0, untrained_rows(rows, trainer.train_dataset, self.source, longest, packing))
        if dropped:
            logger.warning(f"{dropped} of {rows} rows have no token to train on within max_length {longest}.")
        folder.mark_started(self)
        settle_generation(model, trainer.processing_class, trainer.train_dataset)
        checkpoint = last_whole_checkpoint(self.folder)
        # Read now: training may rotate the checkpoint away
        resumed_from = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)) if checkpoint else None
        reset_peak_memory()
        chat.check_ids(trainer.train_dataset, trainer.processing_class, model.config, self.model.model_name_or_path)
        self._train(trainer, checkpoint)
        record = measure(self, trainer, resumed_from)
        record.rows, record.dropped_rows, record.truncated_rows = rows - dropped, dropped, truncated_rows
        with writing(self.folder):
            trainer.save_model()
            trainer.save_state()
            trainer.create_model_card(dataset_name=self.data.dataset)
            PartialState().wait_for_everyone()  # for what the first process saves
            if trainer.hft_selection is not None:
                record.moved = movements(self, trainer.hft_selection, (self.base or self.model).model_name_or_path)
            if PartialState().is_main_process:
                folder.mark_finished(self, record)
        PartialState().wait_for_everyone()
        return record

    def _train(self, trainer: ResumableMixin, checkpoint: str | None) -> None:
        first = _FirstStep()
        trainer.add_callback(first)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except MISTAKES as error:
            if first.begun or isinstance(error, HFTError):
                raise
            raise HFTError(f"{self.name}: training can't begin: {explained(error)}.") from error


class _FirstStep(TrainerCallback):
    """Notes that a step has begun. What is raised before comes of settings, what is raised after may be a fault of a program."""

    begun = False

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = True


def _trl_template(path: str, own: str | None) -> str:
    """The template that TRL sets at `chat_template_path`, where it is a file."""
    if own is not None:
        raise HFTError(f"chat_template is {own!r} and TRL's chat_template_path {path!r}: leave one of them out.")
    if not (Path(path).is_file() and path.endswith((".jinja", ".j2"))):
        raise HFTError(
            f"chat_template_path is {path!r}, which is no .jinja file, and TRL would add the tokens of a tokenizer to the model, whose "
            "half could then not be compared with the start model: give the path of a .jinja file."
        )
    return path


def make_stage(
    name: str,
    model: ModelArguments,
    data: DataArguments,
    args: TrainingArguments,
    hft: HFTConfig | None,
    mixture: DatasetMixtureConfig | None = None,
    base: ModelArguments | None = None,
    adapter: Adapter | None = None,
) -> Stage:
    """
    A stage whose parts fit together: `"demo"` becomes the embedded files, and the trainer loads the model as it says.

    Raises:
        [`HFTError`]: If the arguments ask for what a recipe decides itself.
    """
    if hft is not None:  # here, so that a later stage's mistake is found before the first trains
        check_settings(args, hft)
        check_choice(args, hft)
        replicated.wanted(hft, args)
    if args.resume_from_checkpoint is not None:
        raise HFTError(
            f"resume_from_checkpoint is {args.resume_from_checkpoint!r}, but a recipe goes on from the newest whole checkpoint of "
            "its output_dir by itself: drop it. To go on from an older one, move the newer ones away."
        )
    model = dataclasses.replace(model, model_name_or_path=demo.model_path(model.model_name_or_path))
    if (data.dataset is None) is (mixture is None):
        if mixture is None:
            raise HFTError(f"{name}.dataset is missing: set it in the file, or with --{name}.dataset.")
        raise HFTError(f"{name} has a dataset, {data.dataset!r}, and datasets, a mixture: leave one of them out.")
    if data.dataset == "demo":
        data = dataclasses.replace(data, dataset=str(demo.SFT_DATA if isinstance(args, SFTConfig) else demo.DPO_DATA))
    args.trust_remote_code = model.trust_remote_code
    tokens_to_environment(args)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **(args.model_init_kwargs or {}),
    }
    # Counted by the trainer itself and kept over a resume.
    if args.include_num_input_tokens_seen == "no":
        args.include_num_input_tokens_seen = "non_padding"
    return Stage(name, model, data, args, hft, mixture, base, adapter=adapter)
