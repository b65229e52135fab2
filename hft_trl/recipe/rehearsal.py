"""Rehearse each stage on a tiny model and a few rows before the first stage trains."""

import copy
import io
import itertools
import logging
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate.logging import MultiProcessAdapter
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import send_to_device
from datasets import Dataset, disable_caching, enable_caching, is_caching_enabled
from transformers import (
    AutoConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import align_special_tokens
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from hft_trl.backends import zero
from hft_trl.backends.fsdp import fsdp_version
from hft_trl.chat import check_ids
from hft_trl.errors import MISTAKES, HFTError, explained
from hft_trl.processes import by_first_process
from hft_trl.recipe.arguments import ModelArguments
from hft_trl.recipe.endings import settle_generation
from hft_trl.recipe.rows import check_rendered, untrained_rows
from hft_trl.recipe.stage import Stage
from hft_trl.retention import PREFIX
from hft_trl.retention.meter import MEASURED
from hft_trl.selection import select
from hft_trl.selection.previous import selection_of
from hft_trl.trainers.case import Case
from hft_trl.trainers.compatibility import check

TRAINERS = {SFTConfig: SFTTrainer, DPOConfig: DPOTrainer, KTOConfig: KTOTrainer}
ROWS, LONGEST = 8, 32  # rows, characters or tokens of a text
TINY = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}

# Environment variables of launchers and backends
LAUNCHED = ("ACCELERATE_", "FSDP_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMPI_", "PMI_", "MV2_")

# Arguments that a rehearsal does without: of backends, of other programs, and of the real model
WITHOUT: dict[str, Any] = {
    **dict.fromkeys(
        ("deepspeed", "deepspeed_plugin", "fsdp", "fsdp_plugin_args", "parallelism_config", "ddp_backend")
    ),
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode", "dataset_num_proc", "model_init_kwargs")),
    **dict.fromkeys(("torch_compile", "push_to_hub", "full_determinism", "enable_jit_checkpoint"), False),
    "router_aux_loss_coef": None,
    "report_to": [],
    "skip_memory_metrics": True,
}


def rehearse(stages: Sequence[Stage]) -> None:
    """Read the rows of retention, and try the trainers on a tiny model. All processes must call it."""
    check_chain(stages)
    by_first_process(partial(check_halves, stages))
    if stages[0].retention is not None:
        by_first_process(stages[0].meter)  # for its checks
    by_first_process(partial(_rehearse_all, stages))


def check_chain(stages: Sequence[Stage]) -> None:
    """Reject a stage with method hft that would have to round the model of an fft stage before it."""
    for first, then in itertools.pairwise(stages):
        if first.hft is None or then.hft is None or (first.hft.method, then.hft.method) != ("fft", "hft"):
            continue
        dtype = (then.args.model_init_kwargs or {}).get("dtype")
        upcast = fsdp_version(first.args) == 2 and first.args.mixed_precision in ("bf16", "fp16")
        if upcast and str(dtype).removeprefix("torch.") in ("bfloat16", "float16"):
            raise HFTError(
                f"model.dtype is {dtype}, but under FSDP2 in mixed precision TRL saves what {first.name} trains with "
                f"method fft in float32, which {then.name} with method hft would have to round: set model.dtype to "
                "float32, or method to hft in both."
            )


def check_halves(stages: Sequence[Stage]) -> None:
    """Reject a `reselect` that the selections of the stages before do not allow. Only shapes are needed."""
    skeleton = stages[0].model.structure()
    half = selection_of(skeleton, stages[0].model.model_revision)
    elements = half is not None and half.masks is not None
    for stage in (stage for stage in stages if stage.hft is not None):
        try:
            check(stage.args, stage.hft, after_elements=elements)
            half = select(skeleton, stage.hft.by_shape(), half)
        except HFTError as error:
            raise HFTError(f"{stage.name}: {error}") from error
        elements = Case(stage.args, stage.hft, {}, elements).elements


def check_fills_batch(stage: Stage, rows: int) -> None:
    """Reject a stage of so few rows that `dataloader_drop_last` leaves it no step."""
    batch = stage.args.train_batch_size * stage.args.world_size
    if stage.args.dataloader_drop_last and rows < batch and not vars(stage.args).get("packing"):
        raise HFTError(
            f"{stage.name}: dataloader_drop_last is true, and the {rows} rows of {stage.source} do not fill a "
            f"batch of {batch} (per_device_train_batch_size x processes), so there is no step: set it to false, "
            "or reduce the batch."
        )


def _rehearse_all(stages: Sequence[Stage]) -> None:
    # Trainers change it, and the next stage starts from what the last one saves
    tokenizer = stages[0].load_tokenizer()
    for stage in stages:
        stage.set_template(tokenizer)  # as loading does
        check_fills_batch(stage, stage.count(stage.train_dataset))
        with _unnoticed(), tempfile.TemporaryDirectory() as folder:
            _rehearse(stage, stages[0].model, tokenizer, folder)


def _rehearse(stage: Stage, start: ModelArguments, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    args, name = stage.args, start.model_name_or_path
    given = {"train_dataset": (stage.train_dataset, stage.data.split)}
    if stage.eval_dataset is not None:
        given["eval_dataset"] = stage.eval_dataset, stage.data.eval_split
    samples = {key: _sample(rows, f"{stage.source}, split {split}", tokenizer) for key, (rows, split) in given.items()}
    with _naming(stage, "trackers can be set up", "report_to"):
        for kind in get_reporting_integration_callbacks(args.report_to):
            kind()
    if type(args) not in TRAINERS:  # a recipe of the user's own
        return
    config = AutoConfig.from_pretrained(name, revision=start.model_revision, trust_remote_code=start.trust_remote_code)
    with _naming(stage, "trainer can be built"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=config.get_text_config().vocab_size, **TINY))
        with suppress(OSError):  # it is optional
            model.generation_config = GenerationConfig.from_pretrained(name, revision=start.model_revision)

        def build(least: int, **rows: Dataset) -> Trainer:
            reference = {} if isinstance(args, SFTConfig) else {"ref_model": copy.deepcopy(model)}
            tried, kind = _tried(args, folder, least), TRAINERS[type(args)]
            return kind(copy.deepcopy(model), args=tried, processing_class=tokenizer, **rows, **reference)

        if args.max_length is not None:
            _check_trained(stage, given, partial(build, 0))
        trainer = build(1024, **samples)  # trainers drop rows without a trained token
    check_ids(trainer.train_dataset, tokenizer, config, name)
    with _naming(stage, "loss can be computed", "loss_type", "f_divergence_type"), torch.no_grad():
        if first := trainer.train_dataset.select(range(min(2, len(trainer.train_dataset)))).to_list():
            batch = send_to_device(trainer.data_collator(first), trainer.args.device)
            trainer.compute_loss(trainer.model.train(), batch)
    if args.metric_for_best_model is not None and stage.eval_dataset is not None:
        with _naming(stage, "evaluation can be made"):
            _check_metric(stage, trainer.evaluate())
    with _naming(stage, "optimizer can be made", "optim", "optim_args", "learning_rate"):
        trainer.create_optimizer()
    with _naming(stage, "scheduler can be made", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"):
        trainer.create_scheduler(num_training_steps=max(args.max_steps, 10))
    with _naming(stage, f"model that starts from {name!r} can be saved"):
        config.save_pretrained(folder)
        settle_generation(trainer.model, tokenizer, trainer.train_dataset)
        align_special_tokens(trainer.model, tokenizer)  # as at the start of training
        trainer.save_model(folder)
        trainer.create_model_card(dataset_name=stage.data.dataset)


def _check_trained(stage: Stage, given: dict[str, tuple[Dataset, str]], build: Callable[..., Trainer]) -> None:
    """Reject rows of which `max_length` leaves none with a token to train on. Mostly a few of them tell."""

    def count(chosen: Callable[[Dataset], Dataset]) -> None:
        some = {key: chosen(rows) for key, (rows, _) in given.items()}
        prepared, packing = vars(build(**some)), vars(stage.args).get("packing")
        for key, (_, split) in given.items():
            where = f"{stage.source}, split {split}", stage.args.max_length
            untrained_rows(stage.count(some[key]), prepared[key], *where, packing)

    try:
        count(lambda rows: rows.select(range(0, len(rows), max(len(rows) // ROWS, 1))))
    except HFTError:
        count(lambda rows: rows)


def _check_metric(stage: Stage, metrics: dict[str, float]) -> None:
    """Reject a `metric_for_best_model` that no evaluation has."""
    rows = stage.retention.settings() if stage.retention is not None else {}
    kept = [f"eval_{PREFIX}{figure}" for kind, figure in MEASURED.items() if rows.get(kind)]
    name = stage.args.metric_for_best_model
    if f"eval_{name.removeprefix('eval_')}" not in (valid := [*metrics, *kept]):
        raise HFTError(
            f"{stage.name}: metric_for_best_model is {name!r}, which an evaluation does not have: choose one of "
            f"{', '.join(valid)} (retention/ figures need a section retention)."
        )


def _tried(args: TrainingArguments, folder: str, least: int) -> TrainingArguments:
    """Copy a stage's arguments for one process, a temporary folder, another model and `least` tokens."""
    tried = copy.copy(args)
    kept = vars(args).keys() - WITHOUT.keys() - {"hf_deepspeed_config", "distributed_state", "_setup_devices"}
    tried.__dict__ = {name: copy.deepcopy(value) for name, value in vars(args).items() if name in kept}
    vars(tried).update({name: value for name, value in WITHOUT.items() if name in vars(args)}, output_dir=folder)
    if args.optim_target_modules is not None:
        tried.optim_target_modules = "all-linear"  # the names are the real model's
    if args.max_length is not None and args.max_length > 0:
        tried.max_length = max(args.max_length, least)
    tried.use_cpu = args.device.type == "cpu"
    tried._n_gpu = args.n_gpu if tried.device.type != "cpu" else 0
    return tried


def _sample(dataset: Dataset, name: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Check that the chat template renders the rows, and return a few of them, truncated."""
    check_rendered(tokenizer, dataset, name)
    few = dataset.select(range(min(ROWS, len(dataset))))
    return Dataset.from_list(
        [{column: _short(value) for column, value in row.items()} for row in few], features=dataset.features
    )


def _short(value: Any) -> Any:
    """Truncate a value of a row: texts and contents at the end, tokens at the beginning."""
    if isinstance(value, str):
        return value[:LONGEST]
    if not isinstance(value, list) or not value:
        return value
    if isinstance(value[0], int):
        return value[-LONGEST:]
    return [{**turn, "content": _short(turn["content"])} if "content" in turn else turn for turn in value]


@contextmanager
def _naming(stage: Stage, what: str, *names: str) -> Iterator[None]:
    """Turn a library's error into one line with the settings that may have caused it."""
    try:
        yield
    except HFTError:
        raise
    except (*MISTAKES, AttributeError) as error:
        given = ", ".join(
            f"{name} {value!r}" for name, value in stage.args.to_dict().items() if name in names and value
        )
        raise HFTError(f"{stage.name}: no {what}{given and f' with {given}'}: {explained(error)}") from error


@contextmanager
def _unnoticed() -> Iterator[None]:
    """Run code as if in a process of its own, and restore output, seeds, states and environment."""
    verbosity, disabled = transformers_logging.get_verbosity(), logging.root.manager.disable
    seeds, caching = (random.getstate(), np.random.get_state()), is_caching_enabled()
    gpus = torch.accelerator.device_count()
    device_type = torch.accelerator.current_accelerator().type if gpus else "cuda"
    with ExitStack() as stack:
        for kind in (PartialState, AcceleratorState, GradientState):
            stack.enter_context(patch.dict(kind._shared_state, clear=True))
        stack.enter_context(patch.dict(os.environ))
        stack.enter_context(torch.random.fork_rng(range(gpus), device_type=device_type))
        stack.enter_context(zero.whole_models())
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(redirect_stderr(io.StringIO()))
        for name in [name for name in os.environ if name.startswith(LAUNCHED) and name != "ACCELERATE_TORCH_DEVICE"]:
            del os.environ[name]
        logging.disable(logging.CRITICAL)
        disable_caching()  # the temporary folder in the arguments makes each rehearsal's rows new to the cache
        try:
            yield
        finally:
            if caching:
                enable_caching()
            random.setstate(seeds[0])
            np.random.set_state(seeds[1])
            logging.disable(disabled)
            transformers_logging.set_verbosity(verbosity)
            for once in (transformers_logging.warning_once, MultiProcessAdapter.warning_once):
                once.cache_clear()  # so that the real trainers warn again
