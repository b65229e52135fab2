"""A frozen matrix in 8 or 4 bits that gradients flow through."""

import math
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hft_trl.frozen.smaller_type import SavedFromStart, start_files, types_on_disk
from hft_trl.selection import find_units
from hft_trl.weights import fingerprints

logger = logging.get_logger(__name__)

BLOCK = 64
"""Numbers of a matrix that share a scale in NF4, QLoRA's and bitsandbytes' own choice."""

# Categories of units whose `nn.Linear`s are called: some mixers compute with their weights themselves
CATEGORIES = ("attention", "feed_forward")


class QuantizedLinear(nn.Module):
    """
    A frozen [`~torch.nn.Linear`] in bitsandbytes' int8 (one scale per row) or NF4 (one per 64 numbers).

    The matrix is dequantized for each product, in the inputs' type (under autocast in autocast's), and dropped again.
    Unlike bitsandbytes' own layers it keeps neither its inputs nor a whole matrix for the backward pass. It is in no
    state dict, because the start model's own matrix is saved.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit  # only where it quantises

        super().__init__()
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        self.dtype = linear.weight.dtype
        weight = linear.weight.detach()
        if kind == "int8":
            packed, scale, _ = int8_vectorwise_quant(weight.to(torch.float16))
        else:
            packed, state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
            scale = state.absmax
        # No buffers: DDP sends those in every forward pass
        self.packed = nn.Parameter(packed, requires_grad=False)
        # Kept as integers of the same bits: `model.to(torch.bfloat16)` would round what is a floating-point number
        self.scale = nn.Parameter(scale.view(torch.int32), requires_grad=False)
        self.bias = linear.bias
        self.train(linear.training)

    @property
    def _scales(self) -> torch.Tensor:
        return self.scale.view(torch.float32)

    @property
    def fits(self) -> bool:
        """Whether all values were small enough to be quantized: int8 passes through float16."""
        return bool(self._scales.isfinite().all())

    @property
    def weight(self) -> torch.Tensor:
        """The matrix dequantized to its original type, for code that reads it."""
        return self.whole(self.dtype)

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix that it computes with, `(out_features, in_features)`."""
        if self.kind == "int8":
            return self.packed.to(dtype).mul_((self._scales / 127).unsqueeze(1))
        from bitsandbytes.functional import QuantState, dequantize_4bit

        # As one row: bitsandbytes' CPU kernel gives wrong numbers for rows that are no multiple of a block
        one_row = torch.Size([self.out_features * self.in_features])
        state = QuantState(self._scales, one_row, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
        return dequantize_4bit(self.packed, state).view(self.out_features, self.in_features)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        device = inputs.device.type
        if torch.is_autocast_enabled(device):
            inputs = inputs.to(torch.get_autocast_dtype(device))
        return _Product.apply(inputs, self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load nothing: a checkpoint holds the start model's own matrix, from which this one was quantized."""


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, module: QuantizedLinear) -> torch.Tensor:
        ctx.module = module
        bias = module.bias.to(inputs.dtype) if module.bias is not None else None
        return nn.functional.linear(inputs, module.whole(inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.module.whole(gradient.dtype), None


class Quantized(SavedFromStart):
    """
    Holds the frozen matrices of attention and feed-forward in 8 (`"int8"`) or 4 bits (`"nf4"`).

    What is no `nn.Linear` (fused experts, GPT-2's Conv1D), shares a parameter, or is in no file under its name stays
    whole. A warning names it.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def settle(self, trainer: Any, policy: PreTrainedModel, reference: nn.Module | None) -> None:
        half = trainer.frozen_half
        matrices = frozen_matrices(policy, half.digests.keys())
        files = start_files(policy, trainer._revision)
        on_disk = types_on_disk(files, {name: policy.get_parameter(name) for name in matrices})
        before, after, left = 0, 0, []
        for name in matrices:
            path, parameter, linear = name.rpartition(".")[0], policy.get_parameter(name), matrices[name]
            matrices[name] = None  # so that each whole matrix is gone before the next one is quantized
            quantized = QuantizedLinear(linear, self._kind) if linear is not None and name in on_disk else None
            if quantized is None or not quantized.fits:
                left.append(name)
                continue
            before, after = before + parameter.nbytes, after + quantized.packed.nbytes + quantized.scale.nbytes
            self._held[name] = files[name], parameter.dtype, half.digests.pop(name)
            for holder in (policy, reference):
                if holder is not None:
                    holder.set_submodule(path, quantized)
            held_as = [(f"{path}.packed", quantized.packed), (f"{path}.scale", quantized.scale)]
            half.digests.update(fingerprints(held_as))
        held = len(matrices) - len(left)
        PartialState().print(f"frozen half: {held} matrices in {self._kind}, {after:,} bytes instead of {before:,}.")
        if left:
            logger.warning(
                f"hft.frozen_quantization leaves {len(left)} frozen matrices whole, such as {left[0]}: they are no "
                f"nn.Linear of their own, too large for {self._kind}, or not in the safetensors files of "
                f"{policy.config._name_or_path!r} under these names and with these values."
            )


def frozen_matrices(model: PreTrainedModel, frozen: Collection[str]) -> dict[str, nn.Linear | None]:
    """Return the frozen matrices of attention and feed-forward, each with its replaceable `nn.Linear`."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Linear | None] = {}
    names = {name for unit in find_units(model) if unit.category in CATEGORIES for name in unit.names}
    for name, parameter in model.named_parameters():
        if name in names and name in frozen and parameter.ndim > 1:
            path = name.rpartition(".")[0]
            module = model.get_submodule(path)
            frozen_whole = all(f"{path}.{leaf}" in frozen for leaf, _ in module.named_parameters())
            fits = type(module) is nn.Linear and frozen_whole and uses[id(parameter)] == 1
            found[name] = module if fits else None
    return found


def quantized_bytes(kind: str, rows: int, columns: int) -> int:
    """Return the bytes of a matrix in a [`QuantizedLinear`]."""
    numbers = rows * columns
    return numbers + 4 * rows if kind == "int8" else math.ceil(numbers / 2) + 4 * math.ceil(numbers / BLOCK)


def packed_away(model: nn.Module) -> int:
    """Return how many more parameters a quantized model has than its tensors have elements."""
    found = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sum(m.in_features * m.out_features - m.packed.numel() - m.scale.numel() for m in found)
