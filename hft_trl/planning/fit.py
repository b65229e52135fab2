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
from hft_trl.planning.memory import DTYPES, LAYOUTS, Layout, Storage, Task, at_peak, awaiting_reduction, held, sizes
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
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    @property
    def left(self) -> float:
        """Return the share of the available memory that is left, negative if the plan does not fit."""
        return 1 - self.total / self.available

    @property
    def checkpointing(self) -> str:
        return {0: "none", 1: "full"}.get(self.checkpointed, f"every {self.checkpointed} layers")


class Planner:
    """Plans of one `method` for one model on the meta device. Traced steps are cached."""

    tell: Callable[[str], object] = staticmethod(lambda _: None)  # gets a line before a step is traced, in seconds

    def __init__(self, skeleton: PreTrainedModel, hft: HFTConfig, previous: Selection | None = None) -> None:
        self.method = hft.method
        self._skeleton, self.selection = skeleton, select(skeleton, hft.by_shape(), previous)
        self._sizes = sizes(skeleton, self.selection)
        self._shares, self._published = hft.share_reference and hft.method == "hft", skeleton.config.dtype
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
        possible = [layout for layout in layouts if sum(self._placed(task, layout[0])[1].values()) <= limit]
        for least, way, (name, sync) in product((busy, candidates[0]), CHECKPOINTING[task.stage], possible):
            plan = partial(self.one, task, name, checkpointed=way, sync_each_batch=sync)
            # The whole batch at once can need less than its parts, which keep gradients during later passes
            if plan(candidates[-1]).fits:
                return plan(candidates[-1])
            if plan(least).fits:
                sizes_ = candidates[candidates.index(least) :]
                too_large = bisect_left(sizes_, True, key=lambda size, plan=plan: not plan(size).fits)
                return plan(sizes_[too_large - 1])
        return min((self.smallest(task, name, sync) for name, sync in layouts), key=lambda plan: plan.total)

    def smallest(self, task: Task, name: str, sync_each_batch: bool = False) -> Plan:
        """Return the plan with the least memory: of single rows, or of the whole batch without accumulation."""
        ends = task.micro_batches[0], task.micro_batches[-1]
        return min((self.one(task, name, size, 1, sync_each_batch) for size in ends), key=lambda plan: plan.total)

    def both_stages(self, first: Task, second: Task) -> dict[str, tuple[Task, Plan]]:
        """Return tasks and plans by stage with the first layout name that fits both, else the last one."""
        for name in first.layouts:
            plans = [self.plan(dataclasses.replace(task, layouts=(name,))) for task in (first, second)]
            if all(plan.fits for plan in plans):
                break
        return {task.stage: (task, plan) for task, plan in zip((first, second), plans, strict=True)}

    def one(self, task: Task, name: str, micro_batch: int, checkpointed: int, sync_each_batch: bool = False) -> Plan:
        """Return the plan with given settings, whether it fits or not. `name` is the launch configuration."""
        layout = LAYOUTS[name]
        storage, parts = self._placed(task, name)
        step = self._step(task, storage, layout, micro_batch, checkpointed)
        accumulation = task.global_batch // task.gpus // micro_batch
        defers = name == "fsdp2" and accumulation > 1
        in_passes = awaiting_reduction(parts, self._sizes) if defers and not sync_each_batch else parts
        memory = at_peak(in_passes, step, layout, accumulation > 1)
        if storage.optim == "adamw_torch" and task.device == "cuda" and not storage.optimizer_in_backward:
            # A foreach update allocates the square roots of all second moments, as large as the gradients
            update = {**dict.fromkeys(memory, 0), **parts, "optimizer": parts["optimizer"] + parts["gradients"]}
            memory = max(memory, update, key=lambda parts_: sum(parts_.values()))
        operations, available = step.operations * accumulation, task.gpu_memory - RESERVED
        given = (self.method, name, micro_batch, accumulation, checkpointed)
        return Plan(*given, memory, step.saved, operations, available, sync_each_batch and defers)

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

    def _placed(self, task: Task, name: str) -> tuple[Storage, dict[str, int]]:
        """Return the storage and the bytes between steps. Full fine-tuning has no frozen half."""
        storage = task.storage
        if self.method == "fft":
            none = {"frozen_dtype": None, "frozen_quantization": None, "replicate_frozen": False}
            storage = dataclasses.replace(storage, **none)
        return storage, held(self._sizes, LAYOUTS[name], task.gpus, storage, task.stage == "dpo", self._shares)

    def _step(self, task: Task, storage: Storage, layout: Layout, micro_batch: int, checkpointed: int) -> Step:
        types = ("bfloat16", None) if layout.shards_state else (storage.dtype, storage.frozen_dtype)
        types, autocast = map(DTYPES.get, types), task.autocast and not layout.zero
        options = (task.device, storage.frozen_quantization, storage.optimizer_in_backward)
        sizes_ = (micro_batch, task.sequence_length)
        settings = StepSettings(task.stage, *sizes_, *types, autocast, checkpointed, *options)
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
