"""The micro-batch, activation checkpointing and launch configuration that fit a machine."""

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from transformers import PreTrainedModel

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.planning.memory import DTYPES, LAYOUTS, Layout, Storage, at_peak, awaiting_reduction, held, sizes
from hft_trl.planning.task import Task
from hft_trl.planning.trace import Step, StepSettings, trace_step
from hft_trl.selection import Selection, select
from hft_trl.weights import rounds

# Bytes for the CUDA context, cuBLAS and fragmentation
RESERVED = 10**9
TIGHT = 0.03  # share of the memory below which a plan may be wrong: it was up to 0.4 % below what was measured
BUSY = 2048  # tokens per micro-batch, below which memory bandwidth limits a GPU
# Every n-th layer is checkpointed: 0 is none, 1 is all. TRL 1.16's DPO trainer supports only these two.
CHECKPOINTING = {"sft": (0, 4, 3, 2, 1), "dpo": (0, 1)}


@dataclass(frozen=True)
class Plan:
    """Settings of a training run and the memory that it needs on one GPU."""

    method: str
    layout: str  # name of the launch configuration
    micro_batch: int
    accumulation: int
    checkpointed: int  # every n-th layer: 0 is none, 1 is all
    memory: dict[str, int]  # bytes at the peak of a step, by part
    saved: int  # bytes that the forward pass saves for the backward pass
    operations: int  # floating-point operations per optimizer step
    available: int  # bytes
    sync_each_batch: bool = False  # gradients are reduced after each micro-batch, not only after the last

    @property
    def total(self) -> int:
        """Return the bytes on one GPU."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the GPU has enough memory."""
        return self.total <= self.available

    @property
    def left(self) -> float:
        """Return the share of the available memory that is left, negative if the plan does not fit."""
        return 1 - self.total / self.available

    @property
    def checkpointing(self) -> str:
        """Return the checkpointed layers in words."""
        return {0: "none", 1: "full"}.get(self.checkpointed, f"every {self.checkpointed} layers")


class Planner:
    """Plans of one `method` for one model on the meta device. Traced steps are cached."""

    tell: Callable[[str], object] = staticmethod(lambda _: None)  # gets a line before a step is traced, in seconds

    def __init__(self, skeleton: PreTrainedModel, hft: HFTConfig, previous: Selection | None = None) -> None:
        self.method = hft.method
        self._skeleton, self.selection = skeleton, select(skeleton, hft.by_shape(), previous)
        self._sizes = sizes(skeleton, self.selection)
        self._shares, self._published = hft.share_reference, skeleton.config.dtype
        self._steps: dict[StepSettings, Step] = {}

    def plan(self, task: Task) -> Plan:
        """Return the fitting plan with least recomputation, then largest micro-batch, else the smallest."""
        candidates = task.micro_batches
        rows = 2 if task.stage == "dpo" else 1
        busy = next((size for size in candidates if size * rows * task.sequence_length >= BUSY), candidates[-1])
        # First without sync_each_batch, which needs more communication
        layouts = [(name, sync) for name in task.layouts for sync in ((False, True) if name == "fsdp2" else (False,))]
        # A step is traced only if the memory between steps fits
        limit = task.gpu_memory - RESERVED
        possible = [layout for layout in layouts if sum(self._held(task, layout[0]).values()) <= limit]
        for least, way, (name, sync) in product((busy, candidates[0]), CHECKPOINTING[task.stage], possible):
            plan = partial(self.one, task, name, checkpointed=way, sync_each_batch=sync)
            if plan(least).fits:
                sizes_ = candidates[candidates.index(least) :]
                too_large = bisect_left(sizes_, True, key=lambda size, plan=plan: not plan(size).fits)
                return plan(sizes_[too_large - 1])
        smallest = [self.one(task, name, candidates[0], 1, sync) for name, sync in layouts]
        return min(smallest, key=lambda plan: plan.total)

    def both_stages(self, first: Task, second: Task) -> dict[str, tuple[Task, Plan]]:
        """Return tasks and plans by stage with the first layout name that fits both, else the last one."""
        for name in first.layouts:
            found = {
                task.stage: (task, self.plan(dataclasses.replace(task, layouts=(name,)))) for task in (first, second)
            }
            if all(plan.fits for _, plan in found.values()):
                break
        return found

    def one(self, task: Task, name: str, micro_batch: int, checkpointed: int, sync_each_batch: bool = False) -> Plan:
        """Return the plan with given settings, whether it fits or not. `name` is the launch configuration."""
        layout = self._layout(task, name)
        step = self._step(task, layout, micro_batch, checkpointed)
        accumulation = task.global_batch // task.gpus // micro_batch
        parts = self._held(task, name)
        defers = name == "fsdp2" and accumulation > 1
        in_passes = awaiting_reduction(parts, self._sizes) if defers and not sync_each_batch else parts
        memory = at_peak(in_passes, step, layout, accumulation > 1)
        together = task.storage.optim == "adamw_torch" and task.device == "cuda"
        if together and not task.storage.optimizer_in_backward:
            # A foreach update allocates the square roots of all second moments, as large as the gradients
            update = {**dict.fromkeys(memory, 0), **parts, "optimizer": parts["optimizer"] + parts["gradients"]}
            memory = max(memory, update, key=lambda parts_: sum(parts_.values()))
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
            sync_each_batch and defers,
        )

    def rounds(self, dtype: str) -> bool:
        """Whether a type would change bits of the frozen half by rounding the published weights."""
        return self.method == "hft" and rounds(self._published, DTYPES[dtype])

    def check_types(self, task: Task) -> None:
        """Reject types in which the frozen half would not keep the bits of the published weights."""
        published = str(self._published).removeprefix("torch.")
        casts = [("--launch", name, "bfloat16") for name in task.layouts if LAYOUTS[name].zero]
        for flag, value, dtype in (*casts, ("--dtype", task.storage.dtype, task.storage.dtype)):
            if self.rounds(dtype):
                raise HFTError(
                    f"{flag} is {value}, which rounds the model's weights from {published} to {dtype}, "
                    f"so the frozen half would not keep its bits: remove {flag}, or use --method fft."
                )

    def _storage(self, task: Task) -> Storage:
        """Return the storage of the task. Full fine-tuning has no frozen half."""
        if self.method == "hft":
            return task.storage
        return dataclasses.replace(task.storage, frozen_dtype=None, frozen_quantization=None, replicate_frozen=False)

    def _layout(self, task: Task, name: str) -> Layout:
        layout = LAYOUTS[name]
        if self._storage(task).replicate_frozen:  # the reference uses the policy's frozen half
            layout = dataclasses.replace(layout, whole_frozen=True, shares_reference=True)
        shares = layout.shares_reference and self._shares and self.method == "hft"
        return dataclasses.replace(layout, shares_reference=shares)

    def _held(self, task: Task, name: str) -> dict[str, int]:
        return held(self._sizes, self._layout(task, name), task.gpus, self._storage(task), task.stage == "dpo")

    def _step(self, task: Task, layout: Layout, micro_batch: int, checkpointed: int) -> Step:
        storage = self._storage(task)
        dtype, frozen = ("bfloat16", None) if layout.shards_state else (storage.dtype, storage.frozen_dtype)
        settings = StepSettings(
            task.stage,
            micro_batch,
            task.sequence_length,
            DTYPES[dtype],
            DTYPES[frozen] if frozen else None,
            task.autocast and not layout.zero,
            checkpointed,
            task.device,
            storage.frozen_quantization,
            storage.optimizer_in_backward,
        )
        if settings not in self._steps:
            way = {0: "no", 1: "full"}.get(checkpointed, "selective")
            self.tell(f"{self.method.upper()}: tracing a step, micro-batch {micro_batch}, {way} checkpointing")
            self._steps[settings] = trace_step(self._skeleton, self.selection, settings)
        return self._steps[settings]


def operations_ratios(planners: dict[str, Planner], task: Task, plans: Sequence[Plan]) -> dict[str, float | None]:
    """
    Return operations of an HFT step over those of FFT, `None` if they cannot be compared.

    `equal_settings` uses the settings of HFT's plan for both, `as_planned` each method's own plan if both fit.
    """
    full, half = ({plan.method: plan for plan in plans}.get(method) for method in ("fft", "hft"))
    if half is None:
        return {"equal_settings": None, "as_planned": None}
    same = planners["fft"].one(task, half.layout, half.micro_batch, half.checkpointed)
    as_planned = half.operations / full.operations if full and full.fits and half.fits else None
    return {"equal_settings": half.operations / same.operations, "as_planned": as_planned}
