"""What each launch configuration holds on one GPU, part by part."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hft_trl.config import FROZEN_QUANTIZATIONS
from hft_trl.errors import HFTError
from hft_trl.frozen.quantized_linear import frozen_matrices, quantized_bytes
from hft_trl.planning.trace import Step
from hft_trl.selection import Selection, find_units

OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BFLOAT16 = 2  # bytes


@dataclass(frozen=True)
class Layout:
    """
    How a file of `accelerate_configs/` divides a model among the GPUs.

    Args:
        name (`str`): Name of the file.
        weights, gradients, optimizer (`bool`): Whether each GPU holds a part only.
        computes_in_bfloat16 (`bool`): Whether the weights that are computed with are bfloat16 ones already, so that autocast
            copies none.
        autocast (`bool`): Whether products are under autocast.
        shares_reference (`bool`): Whether the frozen half of policy and reference is stored once.
        whole_frozen (`bool`, *optional*, defaults to `False`): Whether each GPU holds all of the frozen half where it holds a
            part only of what learns (`hft.replicate_frozen`).
        defers_reduction (`bool`, *optional*, defaults to `False`): Whether gradients that accumulate are whole on each GPU, in
            bfloat16, until the last micro-batch of a step, unless `sync_each_batch` is on.
    """

    name: str
    weights: bool
    gradients: bool
    optimizer: bool
    computes_in_bfloat16: bool
    autocast: bool
    shares_reference: bool
    whole_frozen: bool = False
    defers_reduction: bool = False

    def unshared(self) -> "Layout":
        """The same with a whole reference."""
        return dataclasses.replace(self, shares_reference=False)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("single", False, False, False, False, True, True),
        Layout("ddp", False, False, False, False, True, True),
        Layout("fsdp2", True, True, True, True, True, False, defers_reduction=True),
        Layout("zero2", False, True, True, True, False, False),
        Layout("zero3", True, True, True, True, False, False),
    )
}


@dataclass(frozen=True)
class Storage:
    """
    In which types a run holds what it holds.

    Args:
        dtype (`str`, *optional*, defaults to `"float32"`): Type of the weights.
        frozen_dtype (`str`, *optional*): Type of the frozen half, by default the same.
        optim (`str`, *optional*, defaults to `"adamw_torch_fused"`): Name of the optimizer.
        frozen_quantization (`str`, *optional*): `"int8"` or `"nf4"` for the frozen half's matrices.
        optimizer_in_backward (`bool`, *optional*, defaults to `False`): Whether gradients are freed one by one.
        replicate_frozen (`bool`, *optional*, defaults to `False`): Whether FSDP2 leaves the frozen half whole on each GPU.

    Raises:
        [`HFTError`]: If one of them is not known.
    """

    dtype: str = "float32"
    frozen_dtype: str | None = None
    optim: str = "adamw_torch_fused"
    frozen_quantization: str | None = None
    optimizer_in_backward: bool = False
    replicate_frozen: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("dtype", self.dtype, tuple(DTYPES)),
            ("frozen_dtype", self.frozen_dtype, (None, "bfloat16", "float16")),
            ("optim", self.optim, OPTIMIZERS),
            ("frozen_quantization", self.frozen_quantization, FROZEN_QUANTIZATIONS),
        ):
            if value not in known:
                raise HFTError(f"{name} is {value!r}: a plan knows {', '.join(map(str, known))}.")

    @property
    def in_eight_bits(self) -> bool:
        """Whether the optimizer holds its state in 8 bits."""
        return "8bit" in self.optim


@dataclass(frozen=True)
class Sizes:
    """
    Numbers of parameters, of which each tied one counts once.

    Args:
        trainable, frozen (`int`): In the whole model.
        outside (`int`): Outside of the layers.
        outside_trainable (`int`): Those of them that learn.
        layer (`int`): In the largest layer.
        layer_trainable (`int`): Most in a layer that learn.
        tensors (`tuple[tuple[int, bool], ...]`): Of each trainable parameter its size, and whether it is an embedding's.
        quantizable (`tuple[tuple[int, int], ...]`): Rows and columns of each frozen matrix that can be quantised.
    """

    trainable: int
    frozen: int
    outside: int
    outside_trainable: int
    layer: int
    layer_trainable: int
    tensors: tuple[tuple[int, bool], ...]
    quantizable: tuple[tuple[int, int], ...]

    def frozen_bytes(self, size: int, quantization: str | None) -> int:
        """Bytes of the frozen half with `size` bytes for each number that is not quantised."""
        if quantization is None:
            return self.frozen * size
        packed = sum(quantized_bytes(quantization, rows, columns) for rows, columns in self.quantizable)
        return (self.frozen - sum(rows * columns for rows, columns in self.quantizable)) * size + packed


def sizes(skeleton: PreTrainedModel, selection: Selection) -> Sizes:
    """Count a model's parameters under a selection; the model may be on the meta device."""
    everything = selection.config.method == "fft"
    learns = set(selection.trainable)
    numbers = {name: p.numel() for name, p in skeleton.named_parameters()}
    trained = {n for n, p in skeleton.named_parameters() if (p.requires_grad if everything else n in learns)}
    layers: dict[int, list[str]] = {}
    for unit in find_units(skeleton):
        if unit.layer is not None:
            layers.setdefault(unit.layer, []).extend(unit.names)
    inside = {name for names in layers.values() for name in names}
    embeddings = {id(m.weight) for m in skeleton.modules() if isinstance(m, torch.nn.Embedding)}
    kinds = {name: id(p) in embeddings for name, p in skeleton.named_parameters()}
    matrices = frozen_matrices(skeleton, numbers.keys() - trained).values()
    return Sizes(
        trainable=sum(numbers[name] for name in trained),
        frozen=sum(number for name, number in numbers.items() if name not in trained),
        outside=sum(number for name, number in numbers.items() if name not in inside),
        outside_trainable=sum(numbers[name] for name in trained - inside),
        layer=max(sum(numbers[name] for name in names) for names in layers.values()),
        layer_trainable=max(sum(numbers[name] for name in names if name in trained) for names in layers.values()),
        tensors=tuple((numbers[name], kinds[name]) for name in numbers if name in trained),
        quantizable=tuple((m.out_features, m.in_features) for m in matrices if m is not None),
    )


def optimizer_bytes(counted: Sizes, storage: Storage) -> int:
    """State of AdamW: two moments for each trainable number, and a count of the steps for each tensor."""
    if not storage.in_eight_bits:
        return sum(2 * size * DTYPES[storage.dtype].itemsize + 4 for size, _ in counted.tensors)
    # bitsandbytes: small tensors and embeddings (transformers asks for it) in 32 bits, else a byte and a float32 for every 256
    return sum(
        8 * size if embedding or size < 4096 else 2 * (size + 4 * math.ceil(size / 256))
        for size, embedding in counted.tensors
    )


def held(counted: Sizes, layout: Layout, gpus: int, storage: Storage, preference: bool) -> dict[str, int]:
    """
    What a GPU holds from step to step, in bytes by part.

    Args:
        counted ([`Sizes`]):
            Numbers of parameters.
        layout ([`Layout`]):
            The launch configuration.
        gpus (`int`):
            GPUs.
        storage ([`Storage`]):
            Types.
        preference (`bool`):
            Whether there is a reference.
    """
    size = own_size = DTYPES[storage.dtype].itemsize
    frozen_size = DTYPES[storage.frozen_dtype or storage.dtype].itemsize
    if layout.name == "fsdp2":  # accelerate makes float32 of whatever learns
        size = 4
        storage = dataclasses.replace(storage, dtype="float32")
    optimizer = optimizer_bytes(counted, storage)
    if layout.name.startswith("zero"):  # DeepSpeed in bf16: all weights are bfloat16, and float32 masters come on top
        size = own_size = frozen_size = BFLOAT16
        optimizer = 12 * counted.trainable
    trainable, frozen = counted.trainable * size, counted.frozen_bytes(frozen_size, storage.frozen_quantization)
    gradients = max(number for number, _ in counted.tensors) * size if storage.optimizer_in_backward else trainable
    reference = 0
    if preference and layout.weights:  # sharded by itself, in the type that it was loaded in
        reference = (counted.trainable + (0 if layout.shares_reference else counted.frozen)) * own_size
    elif preference:  # its frozen half is the policy's, or at least of the same type
        reference = trainable if layout.shares_reference else trainable + frozen
    of_weights, of_gradients, of_optimizer = (
        gpus if part else 1 for part in (layout.weights, layout.gradients, layout.optimizer)
    )
    return {
        "weights_trainable": trainable // of_weights,
        "weights_frozen": frozen // (1 if layout.whole_frozen else of_weights),
        "reference": reference // of_weights,
        "gradients": gradients // of_gradients,
        "optimizer": optimizer // of_optimizer,
        "communication": _communication(counted, layout, size),
    }


def _communication(counted: Sizes, layout: Layout, size: int) -> int:
    """
    Buffers of the backend. Computed from how the backends work, never measured.

    DDP copies all gradients into buckets. A sharded backend gathers the layer that is computed and the next one, holds what
    is outside of the layers, and has the gradients of these whole until they are scattered.
    """
    if layout.name == "ddp":
        return counted.trainable * size
    everything = 2 * counted.layer + counted.outside
    trainable = 2 * counted.layer_trainable + counted.outside_trainable
    gathered = (trainable if layout.whole_frozen else everything) * BFLOAT16 if layout.weights else 0
    scattered = trainable * BFLOAT16 if layout.gradients else 0
    return gathered + scattered


def awaiting_reduction(parts: dict[str, int], counted: Sizes) -> dict[str, int]:
    """
    What a GPU holds while gradients of earlier micro-batches wait for the last one's, in bytes by part. transformers wraps all
    micro-batches of a step but the last in accelerate's `no_sync`, under which FSDP2 scatters no gradient and keeps them whole.

    Args:
        parts (`dict[str, int]`):
            What it holds from step to step, as [`held`] gives it.
        counted ([`Sizes`]):
            Numbers of parameters.

    Returns:
        `dict[str, int]`: The same, with all gradients in the type that they are computed in.
    """
    # Each becomes a GPU's part of it in float32 as it goes, which is as much at most if there are two GPUs or more
    return {**parts, "gradients": max(parts["gradients"], counted.trainable * BFLOAT16)}


def while_stepping(parts: dict[str, int]) -> dict[str, int]:
    """
    What a GPU holds while AdamW updates all parameters together (`adamw_torch` there, not the fused one), in bytes by part.

    Args:
        parts (`dict[str, int]`):
            What it holds from step to step, as [`held`] gives it.

    Returns:
        `dict[str, int]`: The same, with one more copy of what learns in the optimizer's part, and nothing of the passes.
    """
    # torch makes the roots of all second moments at once; they are as many as the gradients, in their type
    return {
        **parts,
        "optimizer": parts["optimizer"] + parts["gradients"],
        **dict.fromkeys(("weight_copies", "logits", "activations"), 0),
    }


def at_peak(parts: dict[str, int], step: Step, layout: Layout, accumulates: bool) -> dict[str, int]:
    """
    What a GPU holds at the fullest moment of a step, in bytes by part.

    Args:
        parts (`dict[str, int]`):
            What it holds from step to step, as [`held`] or [`awaiting_reduction`] gives it.
        step ([`Step`]):
            The traced step.
        layout ([`Layout`]):
            The launch configuration.
        accumulates (`bool`):
            Whether gradients of an earlier micro-batch are there while the next one is computed.
    """
    fullest = step.at_peak_without_gradients
    gradients = parts["gradients"]
    if not accumulates and not layout.gradients:
        # Gradients come as activations go
        fullest, gradients = step.at_peak, step.at_peak["gradients"]
    return {
        **parts,
        "gradients": gradients,
        "weight_copies": fullest["weight_copies"],
        "logits": fullest["logits"],
        "activations": fullest["activations"],
    }
