"""Which micro-batch, activation checkpointing and launch configuration fit a machine."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedModel

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.planning.memory import (
    DTYPES,
    LAYOUTS,
    Layout,
    Storage,
    at_peak,
    awaiting_reduction,
    held,
    sizes,
    while_stepping,
)
from hft_trl.planning.step import Step, StepSettings, trace_step
from hft_trl.selection import Selection, select

# Left for the CUDA context, cuBLAS and the gaps between the allocator's blocks.
RESERVED = 10**9
BUSY = 2048  # tokens: a GPU that computes fewer at once waits for memory more than it computes
# Every n-th layer is checkpointed: 0 is none, 1 is all. TRL 1.16's DPO trainer knows only these two.
CHECKPOINTING = {"sft": (0, 4, 3, 2, 1), "dpo": (0, 1)}


@dataclass(frozen=True)
class Task:
    """
    What is to be trained, and on what.

    Args:
        stage (`str`): `"sft"` or `"dpo"`.
        gpus (`int`): GPUs, all of them together.
        gpu_memory (`int`): Bytes of one.
        sequence_length (`int`): Tokens of the longest rows.
        global_batch (`int`): Rows (pairs) of an optimizer step.
        storage ([`Storage`]): Types of weights and optimizer.
        layouts (`tuple[str, ...]`): Launch configurations to choose from, the best first.
        autocast (`bool`, *optional*, defaults to `True`): Whether there is mixed precision.
        device (`str`, *optional*, defaults to `"cuda"`): `"cuda"` or `"cpu"`.

    Raises:
        [`HFTError`]: If numbers don't fit each other.
    """

    stage: Literal["sft", "dpo"]
    gpus: int
    gpu_memory: int
    sequence_length: int
    global_batch: int
    storage: Storage = field(default_factory=Storage)
    layouts: tuple[str, ...] = ()
    autocast: bool = True
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        for name in ("gpus", "sequence_length", "global_batch"):
            least = 2 if name == "sequence_length" else 1
            if vars(self)[name] < least:
                raise HFTError(f"--{name.replace('_', '-')} is {vars(self)[name]}: it must be at least {least}.")
        if self.global_batch % self.gpus:
            below = self.global_batch // self.gpus * self.gpus or self.gpus
            raise HFTError(
                f"--global-batch is {self.global_batch}, which {self.gpus} GPUs can't share evenly: give a multiple, such as {below}."
            )
        if not self.layouts:
            several = ("ddp",) if self.storage.frozen_quantization else ("ddp", "fsdp2")
            if self.storage.replicate_frozen:
                several = ("fsdp2",)
            object.__setattr__(self, "layouts", ("single",) if self.gpus == 1 else several)
        if self.storage.optimizer_in_backward and self.gpus > 1:
            raise HFTError(
                f"--optimizer-in-backward is for one GPU, but --gpus is {self.gpus}: leave one of them out."
            )
        if self.storage.replicate_frozen and self.layouts != ("fsdp2",):
            raise HFTError(
                f"--replicate-frozen is for fsdp2, but --launch is {', '.join(self.layouts)}: leave one of them out, or use fsdp2 "
                "on 2 GPUs or more."
            )
        if self.storage.replicate_frozen and "bfloat16" not in (self.storage.dtype, self.storage.frozen_dtype):
            raise HFTError(
                "replicate_frozen needs a frozen half in the type that FSDP2 computes in: set frozen_dtype to bfloat16 too."
            )
        for name in self.layouts:
            if name not in LAYOUTS:
                raise HFTError(f"--launch is {name!r}: it must be one of {', '.join(LAYOUTS)}.")
            if (name == "single") != (self.gpus == 1):
                many = "ddp, fsdp2, zero2 or zero3"
                raise HFTError(
                    f"--launch is {name}, but --gpus is {self.gpus}: {'use ' + many if name == 'single' else 'use single'}."
                )
            if name.startswith("zero") and (
                self.storage.frozen_dtype or self.storage.dtype != "float32" or self.gpus > 8
            ):
                raise HFTError(
                    f"--launch is {name}, which holds a model in one type and has a file for one machine: leave --frozen-dtype, "
                    "--dtype and more than 8 GPUs out, or use fsdp2."
                )
            if self.storage.frozen_quantization and LAYOUTS[name].weights | LAYOUTS[name].gradients:
                raise HFTError(f"--launch is {name}, which can't shard quantised matrices: use single or ddp.")
            if self.storage.in_eight_bits and LAYOUTS[name].optimizer and len(self.layouts) == 1:
                raise HFTError(f"--optim is {self.storage.optim}, which is not tested with {name}: use single or ddp.")

    @property
    def micro_batches(self) -> list[int]:
        """What one GPU may take at once, so that all micro-batches of a step are alike."""
        own = self.global_batch // self.gpus
        if self.storage.optimizer_in_backward:  # gradients that are freed can't be added up
            return [own]
        return [size for size in range(1, own + 1) if own % size == 0]


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
    """

    def __init__(self, skeleton: PreTrainedModel, hft: HFTConfig, previous: Selection | None = None) -> None:
        self.method = hft.method
        self._skeleton, self._selection = skeleton, select(skeleton, hft.by_shape(), previous)
        self._sizes = sizes(skeleton, self._selection)
        self._shares = hft.share_reference
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
            self._steps[settings] = trace_step(self._skeleton, self._selection, settings)
        return self._steps[settings]


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
