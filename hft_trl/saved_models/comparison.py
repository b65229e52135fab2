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
    integer = INTEGERS[common.itemsize]
    difference = base = 0.0
    moved = 0
    for old, new in zip(before.reshape(-1).split(CHUNK), after.reshape(-1).split(CHUNK), strict=True):
        old, new = old.to(common), new.to(common)
        differing = int((old.view(integer) != new.view(integer)).sum())
        base += old.double().square().sum().item()
        if differing:
            moved += differing
            difference += (new.double() - old.double()).square().sum().item()
    return Change(math.sqrt(difference), math.sqrt(base), moved, before.numel())


def relative_change(before: SavedModel, after: SavedModel, names: Iterable[str]) -> float | None:
    """Return the relative change of some parameters as one, or `None` if undefined."""
    pairs = (pair for name in names for pair in after.pairs(before, name))
    return Change.total(change(old, new) for old, new in pairs).relative


def check_alike(base: SavedModel, tuned: SavedModel) -> None:
    """Reject models that differ in architecture, parameter names or shapes, and incomplete ones."""
    ours, theirs = type(base.skeleton).__name__, type(tuned.skeleton).__name__
    if ours != theirs:
        raise HFTError(f"{base.name!r} is a {ours}, {tuned.name!r} a {theirs}: give two models of one architecture.")
    for first, second in ((base, tuned), (tuned, base)):
        missing = first.parameters.keys() - {place.parameter for place in first.places.values()}
        if missing:
            raise HFTError(f"no file of {first.name!r} holds {min(missing)}: save the model again.")
        for key, place in first.places.items():
            ours, theirs = first.tensor(key), first.counterpart(key, second)
            if theirs is None:
                raise HFTError(
                    f"{first.name!r} holds {key}, to which nothing in {second.name!r} corresponds: give two models of "
                    "one architecture, saved in the same way."
                )
            if ours.shape != theirs.shape:
                raise HFTError(
                    f"{place.parameter} has the shape {tuple(ours.shape)} in {first.name!r} and "
                    f"{tuple(theirs.shape)} in {second.name!r}: give two models of one size and vocabulary."
                )
