"""One stage of a recipe: its model, tokenizer and data checked, trained from where its folder stands, and measured."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import ADAPTER_CONFIG_NAME, logging
from trl import SFTConfig
from trl.data_utils import is_conversational

from hft_trl import chat, zero
from hft_trl.backends import check_launch
from hft_trl.checkpoints import last_whole_checkpoint
from hft_trl.data import check_apart, load_mixture, load_split
from hft_trl.endings import settle_generation
from hft_trl.errors import MISTAKES, HFTError, explained
from hft_trl.files import writing
from hft_trl.folder import mark_finished, mark_started
from hft_trl.measure import measure, movements, reset_peak_memory
from hft_trl.meta import build_on_meta
from hft_trl.planning.memory import DTYPES
from hft_trl.quantization import check_quantizable, load_quantized
from hft_trl.recipe import Stage
from hft_trl.rehearsal import check_ids
from hft_trl.report import StageRecord
from hft_trl.resumable import ResumableMixin
from hft_trl.rows import preference_dataset, sft_dataset, untrained_rows
from hft_trl.selection import find_units
from hft_trl.weights import check_not_rounded, check_readable, rounds, weight_files

logger = logging.get_logger(__name__)

LARGE = 20_000  # rows


def check_model(stage: Stage) -> None:
    """
    Check from its config that a model can be trained as launched, before anything is downloaded or trained.

    Raises:
        [`HFTError`]: If there is no such model, or it is no causal LM, is quantised, has no layers to select from, or
            is a folder whose weights are missing or torn; or if a half can't be frozen under the launch's backend or in the
            type that the model is loaded in.
    """
    if stage.hft is not None and stage.hft.method == "hft":
        check_launch(stage.args)
    model, folder = stage.model, Path(stage.model.model_name_or_path)
    if folder.is_dir():
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            raise HFTError(
                f"model folder {str(folder)!r} is an adapter, no whole model: merge it into the model that it was trained on "
                "(load it with peft.AutoPeftModelForCausalLM, call merge_and_unload() and save_pretrained), and give that folder."
            )
        check_readable(weight_files(str(folder)).values())
    structure = build_on_meta(model.model_name_or_path, model.model_revision, model.trust_remote_code)
    if stage.hft is not None:
        find_units(structure, stage.hft.exclude if stage.hft.method == "hft" else ())
        if stage.hft.method == "hft":
            _check_type(stage, structure)


def _check_type(stage: Stage, structure: PreTrainedModel) -> None:
    """As the trainer does when it has loaded the model; of a hub id, whose files may not be here yet, the config is believed."""
    model, args = stage.model.model_name_or_path, stage.args
    dtype, remedy = DTYPES.get(args.model_init_kwargs["dtype"]), None  # none for "auto", which is the files' own
    if args.deepspeed_plugin is not None and args.mixed_precision in ("bf16", "fp16"):
        dtype, remedy = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float16, zero.UNCAST
    if dtype is None:
        return
    if Path(model).is_dir():
        check_not_rounded(model, {name: dtype for name, _ in structure.named_parameters()}, remedy)
    elif rounds(structure.config.dtype, dtype):
        own, asked = (str(kind).removeprefix("torch.") for kind in (structure.config.dtype, dtype))
        raise HFTError(
            f"dtype {asked} rounds {model!r}, whose config says {own}, so the frozen half could not keep its bits: "
            f"{remedy or 'load the model with dtype float32'}, or save it in that dtype first."
        )


def check_reference(stage: Stage, base_model: str) -> None:
    """
    Check that a preference stage can have the reference that its settings ask for, before anything is trained.

    Args:
        stage ([`Stage`]):
            The stage.
        base_model (`str`):
            Hub id or folder of the run's first start model, which has the same shapes.

    Raises:
        [`HFTError`]: Naming what stands against it.
    """
    if stage.data.reference_quantization is not None:
        revision = stage.model.model_revision if base_model == stage.model.model_name_or_path else None
        model = build_on_meta(base_model, revision, stage.model.trust_remote_code)
        check_quantizable(stage.data.reference_quantization, stage.args, model)


def load_reference(stage: Stage) -> PreTrainedModel | None:
    """The reference of a preference stage if it is a quantised one, otherwise `None`: then the trainer makes it of the policy."""
    if stage.data.reference_quantization is None:
        return None
    return load_quantized(stage.model.model_name_or_path, stage.data.reference_quantization, stage.args)


def load_tokenizer(stage: Stage) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of a stage's start model, with a chat template that suits the stage.

    Raises:
        [`HFTError`]: If there is no tokenizer, no such template, or no way to tell the assistant's tokens apart.
    """
    model, template = stage.model, stage.model.chat_template
    if isinstance(stage.args, SFTConfig) and stage.args.chat_template_path is not None:
        template = _trl_template(stage.args.chat_template_path, template)
    tokenizer = chat.load_tokenizer(model.model_name_or_path, template, model.model_revision, model.trust_remote_code)
    if isinstance(stage.args, SFTConfig) and stage.args.assistant_only_loss:
        chat.check_answers_marked(tokenizer)
    return tokenizer


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


def load_data(stage: Stage) -> tuple[Dataset, Dataset | None]:
    """
    Load and check the data sets of a stage.

    Args:
        stage ([`Stage`]):
            The stage. Its loss is restricted to the assistant's tokens only where the data are conversations. Large data
            are prepared by several processes unless its `dataset_num_proc` says otherwise.

    Returns:
        `tuple[Dataset, Dataset | None]`: Rows to train on, and rows to evaluate on if there is an `eval_strategy`.

    Raises:
        [`HFTError`]: Naming what is missing or the first row that can't be trained on.
    """
    if stage.args.eval_strategy != "no" and not stage.data.eval_split:
        raise HFTError(
            f"{stage.name}: eval_strategy is {str(stage.args.eval_strategy.value)!r} but there is no eval_split to evaluate on: "
            "set eval_split, or eval_strategy to 'no'."
        )
    evaluates = stage.args.eval_strategy != "no"
    if evaluates and stage.mixture is None:
        check_apart(stage.data.dataset, stage.data.split, stage.data.eval_split)
    train = _load_split(stage, stage.data.split)
    evaluation = _load_split(stage, stage.data.eval_split) if evaluates else None
    if isinstance(stage.args, SFTConfig):
        stage.args.assistant_only_loss = stage.args.assistant_only_loss and is_conversational(train[0])
    if stage.args.dataset_num_proc is None and len(train) >= LARGE:
        # Faster, and memory-mapped files that a pass has read count as resident until the process lets go of them.
        stage.args.dataset_num_proc = min(max(os.cpu_count() or 1, 4), 16)
    return train, evaluation


def _load_split(stage: Stage, split: str) -> Dataset:
    name = f"{stage.data.dataset}, split {split}"
    if stage.mixture is not None:
        dataset = load_mixture(stage.mixture, split)
    else:
        dataset = load_split(stage.data.dataset, split, stage.data.dataset_config)
    if isinstance(stage.args, SFTConfig):
        return sft_dataset(dataset, name, stage.args.dataset_text_field)
    return preference_dataset(dataset, name, stage.data.drop_equal_pairs)


def train_and_save(
    stage: Stage, trainer: ResumableMixin, rows: int, base_model: str, truncated_rows: int | None = None
) -> StageRecord:
    """
    Train a stage from where its folder stands, save the model, and mark the folder as finished.

    Args:
        stage ([`Stage`]):
            The stage.
        trainer ([`ResumableMixin`]):
            Its trainer.
        rows (`int`):
            Rows of the data set that the trainer was given.
        base_model (`str`):
            Hub id or folder of the run's first start model, from which movements are measured.
        truncated_rows (`int`, *optional*):
            Rows that were cut to fit, where they were counted.

    Returns:
        [`StageRecord`]: What the stage measured.

    Raises:
        [`HFTError`]: If no row has a token to train on, if the last checkpoint has another selection, or if the loss
            diverges.
    """
    packing = isinstance(stage.args, SFTConfig) and stage.args.packing
    dropped = untrained_rows(rows, trainer.train_dataset, stage.data.dataset, stage.args.max_length, packing)
    if dropped:
        logger.warning(
            f"{dropped} of {rows} rows have no token to train on within max_length {stage.args.max_length}."
        )
    mark_started(stage)
    settle_generation(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, trainer.train_dataset)
    checkpoint = last_whole_checkpoint(stage.folder)
    # Read now: training may rotate the checkpoint away
    resumed_from = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)) if checkpoint else None
    reset_peak_memory()
    check_ids(trainer.train_dataset, trainer.processing_class, trainer.model.config, stage.model.model_name_or_path)
    _train(stage, trainer, checkpoint)
    record = measure(stage, trainer, resumed_from)
    record.rows, record.dropped_rows, record.truncated_rows = rows - dropped, dropped, truncated_rows
    with writing(stage.folder):
        trainer.save_model()
        trainer.save_state()
        trainer.create_model_card(dataset_name=stage.data.dataset)
        PartialState().wait_for_everyone()  # for what the first process saves
        if trainer.hft_selection is not None:
            record.moved = movements(stage, trainer.hft_selection, base_model)
        if PartialState().is_main_process:
            mark_finished(stage, record)
    PartialState().wait_for_everyone()
    return record


class _FirstStep(TrainerCallback):
    """Notes that a step has begun. What is raised before comes of settings, what is raised after may be a fault of a program."""

    begun = False

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = True


def _train(stage: Stage, trainer: ResumableMixin, checkpoint: str | None) -> None:
    first = _FirstStep()
    trainer.add_callback(first)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except MISTAKES as error:
        if first.begun or isinstance(error, HFTError):
            raise
        raise HFTError(f"{stage.name}: training can't begin: {explained(error)}.") from error
