"""The run and the machine that a plan is made for, and the memory that each part needs on one GPU."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedModel

from hft_trl.errors import HFTError
from hft_trl.frozen.quantized_linear import frozen_matrices, quantized_bytes
from hft_trl.frozen.smaller_type import kept_in_their_type
from hft_trl.planning.trace import Step
from hft_trl.selection import Selection, find_units

OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BFLOAT16 = 2  # bytes


@dataclass(frozen=True)
class Layout:
    """Distribution of a model over the GPUs by a file of `accelerate_configs/`."""

    name: str
    shards_weights: bool = False
    shards_state: bool = False  # gradients and optimizer state, with bfloat16 weights for computation

    @property
    def zero(self) -> bool:
        """Whether DeepSpeed runs the training, with all weights in bfloat16 and without autocast."""
        return self.name.startswith("zero")


LAYOUTS = {
    "single": Layout("single"),
    "ddp": Layout("ddp"),
    "fsdp2": Layout("fsdp2", shards_weights=True, shards_state=True),
    "zero2": Layout("zero2", shards_state=True),
    "zero3": Layout("zero3", shards_weights=True, shards_state=True),
}


@dataclass(frozen=True)
class Storage:
    """Types of weights and optimizer state, named as in [`HFTConfig`] and the trainer's arguments."""

    dtype: str = "float32"
    frozen_dtype: str | None = None
    optim: str = "adamw_torch_fused"
    frozen_quantization: str | None = None
    optimizer_in_backward: bool = False
    replicate_frozen: bool = False

    def __post_init__(self) -> None:
        for name, known in (("dtype", tuple(DTYPES)), ("optim", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise HFTError(f"{name} is {getattr(self, name)!r}: a plan supports {', '.join(known)}.")

    @property
    def in_eight_bits(self) -> bool:
        return "8bit" in self.optim


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
            raise HFTError("--replicate-frozen needs FSDP2's type: also set frozen_dtype to bfloat16.")
        for name in self.layouts:
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
                raise HFTError(f"--launch is {name}, which cannot shard quantized matrices: use single or ddp.")
            if storage.in_eight_bits and LAYOUTS[name].shards_state:
                raise HFTError(f"--optim is {storage.optim}, which is not tested with {name}: use single or ddp.")

    @property
    def micro_batches(self) -> list[int]:
        """Return the micro-batch sizes that divide a GPU's share of the global batch."""
        own = self.global_batch // self.gpus
        if self.storage.optimizer_in_backward:  # its gradients are freed, so they cannot accumulate
            return [own]
        return [size for size in range(1, own + 1) if own % size == 0]


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters. Tied parameters count once."""

    trainable: int
    frozen: int
    kept: int  # frozen ones that `frozen_dtype` leaves in their type
    outside: int  # of the layers
    outside_trainable: int
    layer: int  # the largest layer
    layer_trainable: int  # the most in one layer
    tensors: tuple[tuple[int, bool], ...]  # of each trainable parameter: size, and whether it is an embedding's
    quantizable: tuple[tuple[int, int], ...]  # rows and columns of each frozen matrix that can be quantized

    def frozen_bytes(self, size: int, quantization: str | None) -> int:
        """Return the bytes of the frozen half, with `size` bytes per parameter that is not quantized."""
        quantized = self.quantizable if quantization else ()
        packed = sum(quantized_bytes(quantization, rows, columns) for rows, columns in quantized)
        return (self.frozen - sum(rows * columns for rows, columns in quantized)) * size + packed


def sizes(skeleton: PreTrainedModel, selection: Selection) -> Sizes:
    """Count a model's parameters under a selection. The model may be on the meta device."""
    parameters = dict(skeleton.named_parameters())
    numbers = {name: parameter.numel() for name, parameter in parameters.items()}
    if selection.config.method == "fft":
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    else:
        trained = numbers.keys() & set(selection.trainable)
    layers: dict[int, list[str]] = {}
    for unit in find_units(skeleton):
        if unit.layer is not None:
            layers.setdefault(unit.layer, []).extend(unit.names)
    outside = numbers.keys() - {name for names in layers.values() for name in names}
    embeddings = {id(module.weight) for module in skeleton.modules() if isinstance(module, torch.nn.Embedding)}
    matrices, kept = frozen_matrices(skeleton, numbers.keys() - trained).values(), kept_in_their_type(skeleton)
    return Sizes(
        trainable=sum(numbers[name] for name in trained),
        frozen=sum(numbers[name] for name in numbers.keys() - trained),
        kept=sum(numbers[name] for name in numbers.keys() - trained if id(parameters[name]) in kept),
        outside=sum(numbers[name] for name in outside),
        outside_trainable=sum(numbers[name] for name in trained & outside),
        layer=max(sum(numbers[name] for name in names) for names in layers.values()),
        layer_trainable=max(sum(numbers[name] for name in names if name in trained) for names in layers.values()),
        tensors=tuple((numbers[name], id(parameters[name]) in embeddings) for name in numbers if name in trained),
        quantizable=tuple((m.out_features, m.in_features) for m in matrices if m is not None),
    )


def held(
    counted: Sizes, layout: Layout, gpus: int, storage: Storage, preference: bool, share_reference: bool = True
) -> dict[str, int]:
    """Return the bytes on a GPU between steps, by part. `preference` adds a reference model."""
    size = own_size = DTYPES[storage.dtype].itemsize
    frozen_size = DTYPES[storage.frozen_dtype or storage.dtype].itemsize
    if layout.name == "fsdp2":  # accelerate casts trainable weights to float32
        size = 4
    optimizer = _optimizer_bytes(counted, size, storage.in_eight_bits)
    if layout.zero:  # bfloat16 weights, with float32 masters in addition
        size = own_size = frozen_size = BFLOAT16
        optimizer = 12 * counted.trainable
    trainable, frozen = counted.trainable * size, counted.frozen_bytes(frozen_size, storage.frozen_quantization)
    frozen += 0 if layout.shards_weights else counted.kept * (own_size - frozen_size)
    gradients = max(number for number, _ in counted.tensors) * size if storage.optimizer_in_backward else trainable
    # Of a sharded policy, the reference can use only a frozen half that is whole in every process
    shares, reference = share_reference and (storage.replicate_frozen or not layout.shards_state), 0
    if preference and layout.shards_weights:  # sharded separately, in the type in which it was loaded
        reference = (counted.trainable + (0 if shares else counted.frozen)) * own_size
    elif preference:  # its frozen half is shared with the policy, or has the same type
        reference = trainable if shares else trainable + frozen
    of_weights, of_state = (gpus if sharded else 1 for sharded in (layout.shards_weights, layout.shards_state))
    return {
        "weights_trainable": trainable // of_weights,
        "weights_frozen": frozen // (1 if storage.replicate_frozen else of_weights),
        "reference": reference // of_weights,
        "gradients": gradients // of_state,
        "optimizer": optimizer // of_state,
        "communication": _communication(counted, layout, size, storage.replicate_frozen),
    }


def _optimizer_bytes(counted: Sizes, itemsize: int, in_eight_bits: bool) -> int:
    """Return the bytes of AdamW's state: two moments per parameter and a step counter per tensor."""
    if not in_eight_bits:
        return sum(2 * size * itemsize + 4 for size, _ in counted.tensors)
    # bitsandbytes: float32 for small tensors and embeddings, else a byte each and a float32 per block of 256
    return sum(
        8 * size if embedding or size < 4096 else 2 * (size + 4 * math.ceil(size / 256))
        for size, embedding in counted.tensors
    )


def _communication(counted: Sizes, layout: Layout, size: int, whole_frozen: bool) -> int:
    """
    Return the bytes of the backend's buffers, derived from its code and never measured.

    DDP copies all gradients into buckets. Sharded backends gather the current and the next layer and all parameters
    outside of layers, whose gradients are complete until they are scattered.
    """
    if layout.name == "ddp":
        return counted.trainable * size
    everything = 2 * counted.layer + counted.outside
    trainable = 2 * counted.layer_trainable + counted.outside_trainable
    gathered = (trainable if whole_frozen else everything) * BFLOAT16 if layout.shards_weights else 0
    scattered = trainable * BFLOAT16 if layout.shards_state else 0
    return gathered + scattered


def awaiting_reduction(parts: dict[str, int], counted: Sizes) -> dict[str, int]:
    """
    Return the parts of [`held`] with full gradients, as in FSDP2 before the last micro-batch.

    accelerate runs all earlier micro-batches in `no_sync`, in which FSDP2 scatters no gradient.
    """
    # Each becomes a float32 shard later, which with two or more GPUs takes no more memory
    return {**parts, "gradients": max(parts["gradients"], counted.trainable * BFLOAT16)}


def at_peak(parts: dict[str, int], step: Step, layout: Layout, accumulates: bool) -> dict[str, int]:
    """Return the bytes at the peak of a step, from parts of [`held`] or [`awaiting_reduction`]."""
    if accumulates or layout.shards_state:
        return {**parts, **step.at_peak_without_gradients, "gradients": parts["gradients"]}
    return {**parts, **step.at_peak}  # gradients grow while activations are freed
