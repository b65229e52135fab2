"""Choose the least recomputation that fits in memory (`activation_checkpointing: auto`)."""

import dataclasses
import os
from collections.abc import Sequence
from functools import partial

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel
from transformers.utils import logging

from hft_trl.backends.fsdp import fsdp_version, replicates_frozen
from hft_trl.errors import HFTError
from hft_trl.planning.fit import CHECKPOINTING, Plan, Planner
from hft_trl.planning.memory import OPTIMIZERS, Storage, Task
from hft_trl.processes import by_first_process
from hft_trl.recipe.stage import Stage
from hft_trl.selection.previous import selection_of

logger = logging.get_logger(__name__)


def settle_checkpointing(*stages: Stage) -> None:
    """Choose the activation checkpointing of all stages that set it to `auto`. All processes must call it."""
    undecided = [stage for stage in stages if stage.auto_checkpointing]
    if not undecided:
        return
    for stage in undecided:
        _check_covered(stage)
    skeleton = stages[0].model.structure()
    plans = by_first_process(partial(_plans, stages, skeleton, _memory()))
    for stage, plan in zip(undecided, plans, strict=True):
        args, kwargs = stage.args, dict(stage.args.activation_checkpointing_kwargs or {})
        kwargs.pop("every_n_layers", None)
        if plan.checkpointed > 1:
            kwargs["every_n_layers"] = plan.checkpointed
        # transformers reads the new names, TRL the old ones
        args.activation_checkpointing = args.gradient_checkpointing = plan.checkpointed > 0
        args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs = kwargs or None
        PartialState().print(
            f"{stage.name}: activation checkpointing {plan.checkpointing}, "
            f"about {plan.total / 1e9:.1f} of {plan.available / 1e9:.1f} GB on each process."
        )
        if not plan.fits and PartialState().is_main_process:
            logger.warning_once(
                f"{stage.name}: {(plan.total - plan.available) / 1e9:.1f} GB are missing, even with every layer "
                "checkpointed: hft-trl plan shows what would help."
            )


def _plans(stages: Sequence[Stage], skeleton: PreTrainedModel, memory: int) -> list[Plan]:
    """Return the plan of each undecided stage: the first that fits, or else the smallest."""
    plans = []
    for stage, planner in zip(stages, _planners(stages, skeleton), strict=True):
        if not stage.auto_checkpointing:
            continue
        args, task, layout = stage.args, _task(stage, skeleton, memory), _layout(stage)
        sync = bool((args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch"))
        # With ZeRO-3, frozen parameters need reentrant checkpointing, which is of all layers or none
        for way in (0, 1) if layout == "zero3" else CHECKPOINTING[stage.kind]:
            plan = planner.one(task, layout, args.per_device_train_batch_size, way, sync)
            if plan.fits:
                break
        plans.append(plan)
    return plans


def _planners(stages: Sequence[Stage], skeleton: PreTrainedModel) -> list[Planner | None]:
    """Return a planner per stage, `None` for adapters and masks. Stages with the same half share one."""
    halves = {stages[0].model.model_name_or_path: selection_of(skeleton, stages[0].model.model_revision)}
    known: dict[tuple[str, tuple[str, ...]], Planner] = {}
    planners: list[Planner | None] = []
    for stage in stages:
        hft, planner = stage.hft, None
        if hft is not None and not (hft.method == "hft" and hft.strategy == "element"):
            previous = None if hft.reselect == "fresh" else halves.get(stage.model.model_name_or_path)
            # Seed 0 stands for all fresh halves, which have about the same size
            planner = Planner(skeleton, dataclasses.replace(hft, seed=0), previous)
            alike = str(dataclasses.replace(hft, seed=0, reselect="fresh")), planner.selection.trainable
            planner = known.setdefault(alike, planner)
            halves[str(stage.folder)] = planner.selection
        planners.append(planner)
    return planners


def _check_covered(stage: Stage) -> None:
    """Reject a stage that a plan does not cover."""
    args, section, hft, layout = stage.args, stage.section, stage.hft, _layout(stage)
    longest = vars(args).get("max_length")
    # With these a step holds another reference or the full logits
    unplanned = ("sync_ref_model", "precompute_ref_log_probs", "label_smoothing_factor")
    reasons = {
        "covers only SFTConfig and DPOConfig": stage.kind is None,
        "does not cover adapters": hft is None,
        "does not cover the masks of strategy element": hft and hft.method == "hft" and hft.strategy == "element",
        f"does not cover {section}.reference_quantization": stage.data.reference_quantization,
        **{f"does not cover {section}.{name}": vars(args).get(name) for name in unplanned},
        f"does not cover {section}.optim {args.optim.value}": args.optim not in OPTIMIZERS,
        f"needs the tokens of a row, but {section}.max_length is {longest}": longest is None or longest < 2,
        f"covers {layout} only with bf16, but mixed_precision is {args.mixed_precision!r}": (
            layout not in ("single", "ddp") and args.mixed_precision != "bf16"
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise HFTError(f"{section}.activation_checkpointing is auto, which {reason}: set it to true or false.")


def _layout(stage: Stage) -> str:
    """Return the launch configuration's name in `accelerate_configs/`, before a trainer exists."""
    args = stage.args
    if args.deepspeed_plugin is not None:
        return "zero3" if args.deepspeed_plugin.zero_stage == 3 else "zero2"
    if fsdp_version(args):
        return "fsdp2"
    return "single" if args.world_size == 1 else "ddp"


def _memory() -> int:
    """Return the least memory of a process in bytes: its GPU's, or its share of the machine."""
    if PartialState().device.type == "cpu":
        own = psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    else:
        own = torch.accelerator.get_memory_info(PartialState().device)[1]
    return min(gather_object([own]))


def _task(stage: Stage, skeleton: PreTrainedModel, memory: int) -> Task:
    args, hft, dtype = stage.args, stage.hft, stage.model.dtype
    if dtype == "auto":
        dtype = str(skeleton.config.dtype or torch.float32).removeprefix("torch.")
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    replicates = replicates_frozen(hft, args)
    optim, quantization = args.optim.value, hft.frozen_quantization
    storage = Storage(dtype, hft.frozen_dtype, optim, quantization, hft.optimizer_in_backward, replicates)
    autocast, device = args.mixed_precision != "no", "cpu" if PartialState().device.type == "cpu" else "cuda"
    return Task(stage.kind, args.world_size, memory, args.max_length, rows, storage, (), autocast, device)
