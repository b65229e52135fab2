"""Differences between the tensors of two saved models, in bits and in norms."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from hft_trl.errors import HFTError
from hft_trl.saved_models.saved_model import SavedModel
from hft_trl.weights import CHUNK

# Integer type by element size, for bitwise comparison
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Change:
    """Change of one or more tensors, as L2 norms in float64 and numbers of elements."""

    difference: float  # norm of the task vector (tuned minus base)
    base: float
    moved: int  # elements that differ in a bit, compared in the promoted type of both
    size: int

    @classmethod
    def total(cls, parts: "Iterable[Change]") -> "Change":
        """Return several changes as one."""
        parts = list(parts)
        difference = math.sqrt(sum(part.difference**2 for part in parts))
        base = math.sqrt(sum(part.base**2 for part in parts))
        return cls(difference, base, sum(part.moved for part in parts), sum(part.size for part in parts))

    @property
    def relative(self) -> float | None:
        """Return the norm of the task vector over the base's, or `None` if undefined."""
        relative = self.difference / self.base if self.base else math.nan
        return relative if math.isfinite(relative) else None

    @property
    def share(self) -> float:
        """Return the share of elements that moved, in [0, 1]."""
        return self.moved / self.size if self.size else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {
            "relative_change": self.relative,
            "moved_share": self.share,
            "moved": self.moved,
            "parameters": self.size,
        }


def change(before: torch.Tensor, after: torch.Tensor) -> Change:
    """Compare two tensors of one shape chunk by chunk. Their types may differ."""
    common = torch.promote_types(before.dtype, after.dtype)
    difference = base = 0.0
    moved = 0
    for old, new in zip(before.reshape(-1).split(CHUNK), after.reshape(-1).split(CHUNK), strict=True):
        old, new = old.to(common), new.to(common)
        moved += int((_bits(old) != _bits(new)).sum())
        old, new = old.double(), new.double()
        difference += (new - old).square().sum().item()
        base += old.square().sum().item()
    return Change(math.sqrt(difference), math.sqrt(base), moved, before.numel())


def relative_change(before: SavedModel, after: SavedModel, names: Iterable[str], learned: bool = True) -> float | None:
    """
    Return the relative change of some parameters as one, or `None` if undefined.

    Norms are computed only where bytes differ. For parameters without `learned`, the change is 0, or `None` if all
    base values are zero.
    """
    pairs = [pair for name in names for pair in after.pairs(before, name)]
    if not learned or all(same_bytes(old, new) for old, new in pairs):
        return 0.0 if any(not is_zero(old) for old, _ in pairs) else None
    return Change.total(change(old, new) for old, new in pairs).relative


def same_bytes(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether two tensors of one shape have the same type and bytes."""
    if before.dtype != after.dtype:
        return False
    pieces = zip(before.reshape(-1).split(CHUNK), after.reshape(-1).split(CHUNK), strict=True)
    return all(torch.equal(_bits(old), _bits(new)) for old, new in pieces)


def is_zero(tensor: torch.Tensor) -> bool:
    """Whether all elements are zero."""
    return not any(bool(piece.any()) for piece in tensor.reshape(-1).split(CHUNK))


def check_alike(base: SavedModel, tuned: SavedModel) -> None:
    """Reject models that differ in architecture, vocabulary, parameter names or shapes."""
    ours, theirs = type(base.skeleton).__name__, type(tuned.skeleton).__name__
    if ours != theirs:
        raise HFTError(f"{base.name!r} is a {ours}, {tuned.name!r} a {theirs}: give two models of one architecture.")
    ours, theirs = (len(next(saved.skeleton.get_input_embeddings().parameters())) for saved in (base, tuned))
    if ours != theirs:
        raise HFTError(
            f"{base.name!r} has a vocabulary of {ours} tokens, {tuned.name!r} one of {theirs}: give the model that "
            "the tuned one started from, with the same vocabulary."
        )
    for first, second in ((base, tuned), (tuned, base)):
        for key in first.places:
            if first.counterpart(key, second) is None:
                raise HFTError(
                    f"{first.name!r} holds {key}, to which nothing in {second.name!r} corresponds: give two models of "
                    "one architecture, saved in the same way."
                )
    for key, place in tuned.places.items():
        before, after = tuple(tuned.counterpart(key, base).shape), tuple(tuned.tensor(key).shape)
        if before != after:
            raise HFTError(
                f"{place.parameter} has the shape {before} in {base.name!r} and {after} in {tuned.name!r}: give two "
                "models of one size."
            )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])
