"""`activation_checkpointing: auto` of a recipe: the least recomputation that fits the machine it runs on."""

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from transformers import PreTrainedModel
from transformers.utils import logging

from hft_trl.backends.fsdp import fsdp_version, replicates_frozen
from hft_trl.errors import HFTError
from hft_trl.planning.fit import CHECKPOINTING, Plan, Planner
from hft_trl.planning.memory import OPTIMIZERS, Storage
from hft_trl.planning.show import checkpointing
from hft_trl.planning.task import Task
from hft_trl.processes import by_first_process
from hft_trl.selection.marks import selection_of
from hft_trl.skeleton import build_on_meta

if TYPE_CHECKING:
    from hft_trl.recipe import Stage

logger = logging.get_logger(__name__)

# Where Linux tells a container its limit: control groups of version 2, and of version 1
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

# Arguments with which a step holds another reference, or logits as a whole.
UNPLANNED = ("sync_ref_model", "precompute_ref_log_probs", "label_smoothing_factor")


def settle_checkpointing(*stages: "Stage") -> None:
    """
    Decide how much the stages of a run compute again, where their settings leave it to the recipe: of the ways that fit the
    memory of one process, as `hft-trl plan` computes them, the one with the least recomputation. Every process has to call.

    Args:
        stages ([`~hft_trl.recipe.Stage`]):
            All stages of the run in order. The first one's model says what shapes all of them have. The arguments of those
            with `auto_checkpointing` are changed in place.

    Raises:
        [`HFTError`]: If a stage has a setting that a plan does not know.
    """
    undecided = [stage for stage in stages if stage.auto_checkpointing]
    if not undecided:
        return
    for stage in undecided:
        _check_known(stage)
    start = stages[0].model
    skeleton = build_on_meta(start.model_name_or_path, start.model_revision, start.trust_remote_code)
    plans = by_first_process(partial(_plans, stages, skeleton, _memory()))
    (plans,) = broadcast_object_list([plans])
    for stage, plan in zip(undecided, plans, strict=True):
        _apply(plan, stage)
        PartialState().print(
            f"{stage.name}: activation checkpointing {checkpointing(plan)}, "
            f"about {plan.total / 1e9:.1f} of {plan.available / 1e9:.1f} GB on each process."
        )
        if not plan.fits and PartialState().is_main_process:
            logger.warning_once(
                f"{stage.name}: {(plan.total - plan.available) / 1e9:.1f} GB more than there are, even with every layer "
                "checkpointed: hft-trl plan says what would help."
            )


def _plans(stages: Sequence["Stage"], skeleton: PreTrainedModel, memory: int) -> list[Plan]:
    """The way that each stage that leaves it open is to take."""
    plans = []
    for stage, planner in zip(stages, _planners(stages, skeleton), strict=True):
        if stage.auto_checkpointing:
            plans.append(_least(planner, stage, _task(stage, skeleton, memory)))
    return plans


def _planners(stages: Sequence["Stage"], skeleton: PreTrainedModel) -> list[Planner | None]:
    """
    Of each stage a planner with as large a half as it will have; `None` of adapters and of masks, which are not planned.

    `"same"` and `"complement"` go by the half of the stage that a stage starts from. Fresh halves of other seeds are about
    as large, so that of seed 0 stands for all of them. Stages that train the same parameters share the steps that were traced.
    """
    first = stages[0].model.model_name_or_path
    halves, masked = {first: selection_of(skeleton)}, set()
    if halves[first] is not None and halves[first].masks is not None:
        masked.add(first)
    known: dict[tuple[str, tuple[str, ...]], Planner] = {}
    planners: list[Planner | None] = []
    for stage in stages:
        start, folder, hft, planner = stage.model.model_name_or_path, str(stage.folder), stage.hft, None
        fresh = hft is None or hft.reselect == "fresh"
        if hft is not None and hft.method == "hft" and (hft.strategy == "element" or (start in masked and not fresh)):
            masked.add(folder)
            if stage.auto_checkpointing:
                raise HFTError(
                    f"{stage.section}.activation_checkpointing is auto, which is not planned for the masks of strategy element: "
                    "set it to true or false."
                )
        elif hft is not None:
            planner = Planner(skeleton, dataclasses.replace(hft, seed=0), None if fresh else halves.get(start))
            alike = str(dataclasses.replace(hft, seed=0, reselect="fresh")), planner.selection.trainable
            planner = known.setdefault(alike, planner)
            halves[folder] = planner.selection
        planners.append(planner)
    return planners


def _check_known(stage: "Stage") -> None:
    args, section = stage.args, stage.section
    asked = f"{section}.activation_checkpointing is auto"
    if section not in CHECKPOINTING:
        raise HFTError(f"{asked}, which is planned for the stages sft and dpo only: set it to true or false.")
    if stage.hft is None:
        raise HFTError(f"{asked}, which is not planned for adapters: set it to true or false.")
    for name, unplanned in (
        *((f"{section}.{name}", vars(args).get(name)) for name in UNPLANNED),
        (f"{section}.reference_quantization", stage.data.reference_quantization),
    ):
        if unplanned:
            raise HFTError(f"{asked}, which does not count what {name} changes: set it to true or false.")
    if args.optim not in OPTIMIZERS:
        raise HFTError(
            f"{asked}, which knows the optimizers {', '.join(OPTIMIZERS)}, but {section}.optim is {args.optim.value!r}: set it to "
            "true or false."
        )
    if args.max_length is None or args.max_length < 2:
        raise HFTError(f"{asked}, but {section}.max_length is {args.max_length}: say how long rows are at most.")
    if fsdp_version(args) == 1:
        raise HFTError(f"{asked}, which knows FSDP2 only: set fsdp_version to 2, or it to true or false.")
    own = (args.fsdp_plugin_args or {}).get("activation_checkpointing")
    if own or (own is None and fsdp_version(args) and parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING")):
        raise HFTError(f"{asked}, but fsdp_activation_checkpointing is on already: drop one of the two.")
    name = _layout(stage)
    if name not in ("single", "ddp") and args.mixed_precision != "bf16":
        raise HFTError(
            f"{asked}, which is computed for {name} with bf16, but mixed_precision is {args.mixed_precision!r}: set it to true or "
            "false."
        )


def _layout(stage: "Stage") -> str:
    """The launch configuration, by its name in `accelerate_configs/`, before there is a trainer."""
    if stage.args.deepspeed_plugin is not None:
        return "zero3" if stage.args.deepspeed_plugin.zero_stage == 3 else "zero2"
    if fsdp_version(stage.args):
        return "fsdp2"
    return "single" if stage.args.world_size == 1 else "ddp"


def _memory() -> int:
    """Bytes that a process may take: all of its GPU, or its part of the machine's where there is none; of the smallest machine."""
    if PartialState().device.type == "cpu":
        own = min([psutil.virtual_memory().total, *_limits()]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    else:
        own = torch.accelerator.get_memory_info(PartialState().device)[1]
    return min(gather_object([own]))


def _limits() -> list[int]:
    """Bytes that the container may take, where there is one; psutil tells the machine's only."""
    found = [path.read_text().strip() for path in LIMITS if path.is_file()]
    return [int(limit) for limit in found if limit != "max"]


def _task(stage: "Stage", skeleton: PreTrainedModel, memory: int) -> Task:
    args, dtype = stage.args, stage.model.dtype
    if dtype == "auto":
        dtype = str(skeleton.config.dtype or torch.float32).removeprefix("torch.")
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return Task(
        stage.section,
        args.world_size,
        memory,
        args.max_length,
        rows,
        Storage(
            dtype,
            stage.hft.frozen_dtype,
            args.optim.value,
            frozen_quantization=stage.hft.frozen_quantization,
            optimizer_in_backward=stage.hft.optimizer_in_backward,
            replicate_frozen=replicates_frozen(stage.hft, args),
        ),
        autocast=args.mixed_precision != "no",
        device="cpu" if PartialState().device.type == "cpu" else "cuda",
    )


def _least(planner: Planner, stage: "Stage", task: Task) -> Plan:
    """The plan with the least recomputation that fits, the one with the most if none does."""
    ways = CHECKPOINTING[stage.section]
    if _layout(stage) == "zero3":
        ways = (ways[0], ways[-1])  # frozen parameters need reentrant checkpointing there, of all layers or none
    for way in ways:
        plan = planner.one(task, _layout(stage), stage.args.per_device_train_batch_size, way, _syncs(stage))
        if plan.fits:
            break
    return plan


def _syncs(stage: "Stage") -> bool:
    """Whether the stage's own settings divide gradients after each micro-batch."""
    kwargs = stage.args.accelerator_config.gradient_accumulation_kwargs or {}
    return bool(kwargs.get("sync_each_batch"))


def _apply(plan: Plan, stage: "Stage") -> None:
    args = stage.args
    # transformers reads the new names, TRL the old ones
    args.activation_checkpointing = args.gradient_checkpointing = plan.checkpointed > 0
    kwargs = {
        key: value for key, value in (args.activation_checkpointing_kwargs or {}).items() if key != "every_n_layers"
    }
    if plan.checkpointed > 1:
        kwargs["every_n_layers"] = plan.checkpointed
    args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs = kwargs or None
