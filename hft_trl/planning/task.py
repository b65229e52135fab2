"""The training run and the machine that a plan is made for."""

from dataclasses import dataclass, field
from typing import Literal

from hft_trl.errors import HFTError
from hft_trl.planning.memory import LAYOUTS, Storage


@dataclass(frozen=True)
class Task:
    """A stage of training and its machine. Conflicting settings raise an [`HFTError`]."""

    stage: Literal["sft", "dpo"]
    gpus: int  # total
    gpu_memory: int  # bytes per GPU
    sequence_length: int  # tokens of the longest rows
    global_batch: int  # rows (pairs) per optimizer step
    storage: Storage = field(default_factory=Storage)
    layouts: tuple[str, ...] = ()  # launch configurations to choose from, in order of preference
    autocast: bool = True
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        storage = self.storage
        for name, least in (("gpus", 1), ("sequence_length", 2), ("global_batch", 1)):
            value = getattr(self, name)
            if value < least:
                raise HFTError(f"--{name.replace('_', '-')} is {value}: it must be at least {least}.")
        if self.global_batch % self.gpus:
            below = self.global_batch // self.gpus * self.gpus or self.gpus
            raise HFTError(
                f"--global-batch is {self.global_batch}, which is not divisible by {self.gpus} GPUs: "
                f"use a multiple, such as {below}."
            )
        if not self.layouts:
            several = ("ddp",) if storage.frozen_quantization or storage.in_eight_bits else ("ddp", "fsdp2")
            if storage.replicate_frozen:
                several = ("fsdp2",)
            object.__setattr__(self, "layouts", ("single",) if self.gpus == 1 else several)
        if storage.optimizer_in_backward and self.gpus > 1:
            raise HFTError(f"--optimizer-in-backward needs one GPU, but --gpus is {self.gpus}: remove one of the two.")
        if storage.replicate_frozen and self.layouts != ("fsdp2",):
            raise HFTError(
                f"--replicate-frozen needs fsdp2, but --launch is {', '.join(self.layouts)}: "
                "remove one of the two, or use fsdp2 on 2 or more GPUs."
            )
        if storage.replicate_frozen and "bfloat16" not in (storage.dtype, storage.frozen_dtype):
            raise HFTError(
                "--replicate-frozen needs a frozen half in the type that FSDP2 computes in: "
                "also set frozen_dtype to bfloat16."
            )
        for name in self.layouts:
            self._check_layout(name)

    def _check_layout(self, name: str) -> None:
        storage = self.storage
        if name not in LAYOUTS:
            raise HFTError(f"--launch is {name!r}: it must be one of {', '.join(LAYOUTS)}.")
        if (name == "single") != (self.gpus == 1):
            fix = "single" if self.gpus == 1 else "ddp, fsdp2, zero2 or zero3"
            raise HFTError(f"--launch is {name}, but --gpus is {self.gpus}: use {fix}.")
        if LAYOUTS[name].zero and (storage.frozen_dtype or storage.dtype != "float32" or self.gpus > 8):
            raise HFTError(
                f"--launch is {name}, which stores a model in one type and is configured for one machine: "
                "remove --frozen-dtype and --dtype, use at most 8 GPUs, or use fsdp2."
            )
        if storage.frozen_quantization and LAYOUTS[name].shards_state:
            raise HFTError(f"--launch is {name}, which cannot shard quantised matrices: use single or ddp.")
        if storage.in_eight_bits and LAYOUTS[name].shards_state:
            raise HFTError(f"--optim is {storage.optim}, which is not tested with {name}: use single or ddp.")

    @property
    def micro_batches(self) -> list[int]:
        """Return the micro-batch sizes that divide a GPU's share of the global batch."""
        own = self.global_batch // self.gpus
        if self.storage.optimizer_in_backward:  # its gradients are freed, so they cannot accumulate
            return [own]
        return [size for size in range(1, own + 1) if own % size == 0]
