"""What is to be trained, and on what: the question that a plan answers."""

from dataclasses import dataclass, field
from typing import Literal

from hft_trl.errors import HFTError
from hft_trl.planning.memory import LAYOUTS, Storage


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
