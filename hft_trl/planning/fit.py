"""Which micro-batch, activation checkpointing and launch configuration fit a machine."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.planning.memory import (
    DTYPES,
    LAYOUTS,
    Layout,
    at_peak,
    awaiting_reduction,
    held,
    sizes,
    while_stepping,
)
from hft_trl.planning.task import Task
from hft_trl.planning.trace import Step, StepSettings, trace_step
from hft_trl.selection import Selection, select
from hft_trl.weights import rounds

# Left for the CUDA context, cuBLAS and the gaps between the allocator's blocks.
RESERVED = 10**9
BUSY = 2048  # tokens: a GPU that computes fewer at once waits for memory more than it computes
# Every n-th layer is checkpointed: 0 is none, 1 is all. TRL 1.16's DPO trainer knows only these two.
CHECKPOINTING = {"sft": (0, 4, 3, 2, 1), "dpo": (0, 1)}


@dataclass(frozen=True)
class Plan:
    """
    A way to train, and what it takes.

    Args:
        method (`str`): `"hft"` or `"fft"`.
        layout (`str`): Name of the launch configuration.
        micro_batch (`int`): `per_device_train_batch_size`.
        accumulation (`int`): `gradient_accumulation_steps`.
        checkpointed (`int`): Every which layer is checkpointed: 0 for none, 1 for all.
        memory (`dict[str, int]`): Bytes on one GPU at the fullest moment of a step, by part.
        saved (`int`): Bytes that the forward pass keeps for the backward pass.
        operations (`int`): Floating-point operations of one GPU for an optimizer step.
        available (`int`): Bytes that the GPU has for it.
        sync_each_batch (`bool`, *optional*, defaults to `False`): Whether gradients are divided among the GPUs after each
            micro-batch, not only after the last one of a step.
    """

    method: str
    layout: str
    micro_batch: int
    accumulation: int
    checkpointed: int
    memory: dict[str, int]
    saved: int
    operations: int
    available: int
    sync_each_batch: bool = False

    @property
    def total(self) -> int:
        """Bytes on one GPU."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the GPU has them."""
        return self.total <= self.available


class Planner:
    """
    Plans of one method for one model. Steps that were traced are remembered.

    Args:
        skeleton ([`~transformers.PreTrainedModel`]):
            The model on the meta device, as it was built.
        hft ([`HFTConfig`]):
            The method, and what to train.
        previous ([`Selection`], *optional*):
            What the model was trained with.

    Attributes:
        method (`str`): `"hft"` or `"fft"`.
        selection ([`Selection`]): What learns, by its shape.
    """

    def __init__(self, skeleton: PreTrainedModel, hft: HFTConfig, previous: Selection | None = None) -> None:
        self.method = hft.method
        self._skeleton, self.selection = skeleton, select(skeleton, hft.by_shape(), previous)
        self._sizes = sizes(skeleton, self.selection)
        self._shares, self._published = hft.share_reference, skeleton.config.dtype
        self._steps: dict[StepSettings, Step] = {}

    def plan(self, task: Task) -> Plan:
        """
        The plan with the least to compute that fits, and the largest micro-batch of it; if none fits, the smallest one.

        Args:
            task ([`Task`]):
                What is to be trained.
        """
        sizes_ = task.micro_batches
        rows = 2 if task.stage == "dpo" else 1
        busy = next((size for size in sizes_ if size * rows * task.sequence_length >= BUSY), sizes_[-1])
        ways = [
            (checkpointed, name, sync)
            for checkpointed in CHECKPOINTING[task.stage]
            for name in self._layouts(task)
            if not self._hopeless(task, name)
            for sync in _reductions(name)
        ]
        for least in dict.fromkeys((busy, sizes_[0])):
            for checkpointed, name, sync in ways:
                plan = self.one(task, name, least, checkpointed, sync)
                if plan.fits:
                    larger = [size for size in sizes_ if size > least]
                    return _last(larger, lambda size: self.one(task, name, size, checkpointed, sync), plan)  # noqa: B023
        smallest = (
            self.one(task, name, sizes_[0], 1, sync) for name in self._layouts(task) for sync in _reductions(name)
        )
        return min(smallest, key=lambda plan: plan.total)

    def rounds(self, dtype: str) -> bool:
        """Whether the model's published weights can't be loaded in a type, since the frozen half has to keep its bits."""
        return self.method == "hft" and rounds(self._published, DTYPES[dtype])

    def check_types(self, task: Task) -> None:
        """
        Check that a half can be trained in the types asked for.

        Args:
            task ([`Task`]):
                What is to be trained.

        Raises:
            [`HFTError`]: Naming the flag that rounds the published weights.
        """
        zero = [name for name in task.layouts if name.startswith("zero")]
        if zero and self.rounds("bfloat16"):
            raise HFTError(
                f"--launch is {zero[0]}, which casts all weights to bfloat16, but the model's are {_name(self._published)}, so the "
                "frozen half could not keep its bits: use fsdp2, or --method fft."
            )
        if self.rounds(task.storage.dtype):
            raise HFTError(
                f"--dtype is {task.storage.dtype}, but the model's weights are {_name(self._published)}, so the frozen half could "
                "not keep its bits: leave --dtype out, which is float32, or use --method fft."
            )

    def both_stages(self, first: Task, second: Task) -> dict[str, tuple[Task, Plan]]:
        """
        Tasks and plans by stage, under the first launch configuration that fits both; the last one if none does.

        Args:
            first, second ([`Task`]):
                The two stages on the same machine.
        """
        found: dict[str, tuple[Task, Plan]] = {}
        for name in self._layouts(first):
            found = {
                task.stage: (task, self.plan(dataclasses.replace(task, layouts=(name,)))) for task in (first, second)
            }
            if all(plan.fits for _, plan in found.values()):
                break
        return found

    def one(self, task: Task, name: str, micro_batch: int, checkpointed: int, sync_each_batch: bool = False) -> Plan:
        """What one way of training takes, whether it fits or not."""
        layout = self._layout(task, name)
        step = self._step(task, layout, micro_batch, checkpointed)
        accumulation = task.global_batch // task.gpus // micro_batch
        parts = self._held(task, layout)
        deferred = layout.defers_reduction and accumulation > 1 and not sync_each_batch
        in_passes = awaiting_reduction(parts, self._sizes) if deferred else parts
        memory = at_peak(in_passes, step, layout, accumulation > 1)
        together = task.storage.optim == "adamw_torch" and task.device == "cuda"
        if together and not task.storage.optimizer_in_backward:
            memory = max(memory, while_stepping(parts), key=lambda held_: sum(held_.values()))
        return Plan(
            self.method,
            name,
            micro_batch,
            accumulation,
            checkpointed,
            memory,
            step.saved,
            step.operations * accumulation,
            task.gpu_memory - RESERVED,
            sync_each_batch and layout.defers_reduction and accumulation > 1,
        )

    def _layout(self, task: Task, name: str) -> Layout:
        layout, half = LAYOUTS[name], self.method == "hft"
        if half and task.storage.replicate_frozen:  # then the reference's frozen half is the policy's
            layout = dataclasses.replace(layout, whole_frozen=True, shares_reference=True)
        return layout if self._shares and half else layout.unshared()

    def _layouts(self, task: Task) -> Iterator[str]:
        for name in task.layouts:
            if not (task.storage.in_eight_bits and LAYOUTS[name].optimizer):
                yield name

    def _held(self, task: Task, layout: Layout) -> dict[str, int]:
        whole = {"frozen_dtype": None, "frozen_quantization": None, "replicate_frozen": False}
        storage = task.storage if self.method == "hft" else dataclasses.replace(task.storage, **whole)
        return held(self._sizes, layout, task.gpus, storage, task.stage == "dpo")

    def _hopeless(self, task: Task, name: str) -> bool:
        """Whether what is there from step to step is too much already, so that no step has to be traced."""
        parts = self._held(task, self._layout(task, name))
        return sum(parts.values()) > task.gpu_memory - RESERVED

    def _step(self, task: Task, layout: Layout, micro_batch: int, checkpointed: int) -> Step:
        dtype = "bfloat16" if layout.computes_in_bfloat16 else task.storage.dtype
        frozen = None if layout.computes_in_bfloat16 or self.method == "fft" else task.storage.frozen_dtype
        settings = StepSettings(
            task.stage,
            micro_batch,
            task.sequence_length,
            DTYPES[dtype],
            DTYPES[frozen] if frozen else None,
            layout.autocast and task.autocast,
            checkpointed,
            task.device,
            frozen_quantization=task.storage.frozen_quantization if self.method == "hft" else None,
            optimizer_in_backward=task.storage.optimizer_in_backward,
        )
        if settings not in self._steps:
            self._steps[settings] = trace_step(self._skeleton, self.selection, settings)
        return self._steps[settings]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reductions(name: str) -> tuple[bool, ...]:
    """Values of `sync_each_batch` to choose from, the one with less traffic first."""
    return (False, True) if LAYOUTS[name].defers_reduction else (False,)


def _last(sizes: Sequence[int], plan_of: Callable[[int], Plan], best: Plan) -> Plan:
    """The plan of the largest size that fits, by bisection, or the best so far."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        plan = plan_of(sizes[middle])
        if plan.fits:
            best, low = plan, middle + 1
        else:
            high = middle
    return best


def operations_ratios(planners: dict[str, Planner], task: Task, plans: Sequence[Plan]) -> dict[str, float | None]:
    """
    What a step of HFT computes as a share of FFT's.

    Args:
        planners (`dict[str, Planner]`):
            Planners of `"hft"` and `"fft"`.
        task ([`Task`]):
            What is to be trained.
        plans (`Sequence[Plan]`):
            The plans that were made.

    Returns:
        `dict[str, float | None]`: `"equal_settings"`, both with the settings of HFT's plan, and `"as_planned"`, each with its
        own where both fit; `None` without a plan of HFT, or of both.
    """
    own = {plan.method: plan for plan in plans}
    if "hft" not in own:
        return {"equal_settings": None, "as_planned": None}
    half = own["hft"]
    full = planners["fft"].one(task, half.layout, half.micro_batch, half.checkpointed)
    both_fit = "fft" in own and own["fft"].fits and half.fits
    return {
        "equal_settings": half.operations / full.operations,
        "as_planned": half.operations / own["fft"].operations if both_fit else None,
    }
