"""Differences between saved models in bits and in norms, and whether the frozen half kept its bits."""

import dataclasses
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hft_trl import demo
from hft_trl.errors import HFTError
from hft_trl.report.layer_map import category_rank
from hft_trl.saved_models.saved_model import SavedModel, short
from hft_trl.selection import Selection, Unit, find_units
from hft_trl.selection.previous import selection_of
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
        return self.moved / self.size if self.size else 0.0

    def as_json(self) -> dict[str, Any]:
        share = {"relative_change": self.relative, "moved_share": self.share}
        return {**share, "moved": self.moved, "parameters": self.size}


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


@dataclass(frozen=True)
class ModelDiff:
    """Comparison of a tuned model with its base, both named as the user named them."""

    base: str
    tuned: str
    selection: Selection | None  # None if the tuned model holds no hft_selection.json
    units: list[tuple[Unit, Change]]
    frozen: list[str]  # parameters that were frozen completely or partly
    touched: list[str]  # of these, the ones with a changed frozen bit
    dtypes: tuple[str, str]  # in both models' files, of the frozen parameters (of all if none is frozen)
    is_start: bool | None  # whether training started from the base, by the digest in the selection; None if unknown
    stage: "ModelDiff | None" = None  # against the start model of the last stage, if that is another one and exists

    @property
    def method(self) -> str | None:
        return self.selection.config.method if self.selection else None

    @property
    def byte_identical(self) -> bool | None:
        """Whether the frozen half equals the base's; `None` if nothing was frozen."""
        return not self.touched if self.frozen else None

    def grouped(self) -> tuple[dict[tuple[int, str], Change], dict[str, Change]]:
        """Return the changes by layer and category, and by category alone."""
        cells: dict[tuple[int, str], list[Change]] = {}
        categories: dict[str, list[Change]] = {}
        for unit, moved in self.units:
            categories.setdefault(unit.category, []).append(moved)
            if unit.layer is not None:
                cells.setdefault((unit.layer, unit.category), []).append(moved)
        return (
            {place: Change.total(parts) for place, parts in sorted(cells.items())},
            {name: Change.total(categories[name]) for name in sorted(categories, key=category_rank)},
        )


def compare(base: str, tuned: Iterable[str]) -> list[ModelDiff]:
    """Compare tuned models with their base in chunks of a tensor, without loading a model."""
    before = SavedModel(base)
    models = [SavedModel(name) for name in tuned]
    for after in models:
        check_alike(before, after)
    diffs = []
    for after in models:
        is_start = _started_from(before, after)
        start = _find_start(after) if is_start is False else None
        stage = _compare(start, after, True) if start is not None else None
        diffs.append(dataclasses.replace(_compare(before, after, is_start), stage=stage))
    return diffs


def _started_from(before: SavedModel, after: SavedModel) -> bool | None:
    """Return whether a model's last stage started from a model, `None` if its selection does not tell."""
    selection = selection_of(after.skeleton)
    if selection is None or not selection.start_model or not selection.start_model["weights_digest"]:
        return None
    # The start model was hashed in the type of training
    held = [after.dtypes, before.dtypes, dict.fromkeys(after.parameters, torch.float32)]
    distinct = [dtypes for number, dtypes in enumerate(held) if dtypes not in held[:number]]
    return any(before.digest(dtypes) == selection.start_model["weights_digest"] for dtypes in distinct)


def _find_start(after: SavedModel) -> SavedModel | None:
    """Return the folder that a model's last stage started from, even if both were moved."""
    known = Path(selection_of(after.skeleton).start_model["name_or_path"])
    for folder in (known, Path(after.path).parent / known.name):
        if folder.is_dir() and folder.name:
            with suppress(HFTError):  # another model by now
                start = SavedModel(demo.shown(str(folder)))
                check_alike(start, after)
                if _started_from(start, after):
                    return start
    return None


def _compare(before: SavedModel, after: SavedModel, is_start: bool | None) -> ModelDiff:
    selection = selection_of(after.skeleton)
    frozen = []
    if selection is not None and selection.config.method != "fft":
        if unknown := {*selection.trainable, *selection.frozen}.difference(after.parameters):
            raise HFTError(
                f"the selection in {after.name!r} names {min(unknown)}, which the model lacks: it is another model's."
            )
        learns = set(selection.trainable) - selection.masked.keys()  # elements of masked ones are frozen
        frozen = [name for name in after.parameters if name not in learns]
    changes = {
        name: [change(old, new) for old, new in after.pairs(before, name)]
        for name in logging.tqdm(after.parameters, desc=f"Comparing {after.name}", disable=None, leave=False)
    }

    def touched(name: str) -> bool:
        if name not in selection.masked:
            return any(part.moved for part in changes[name])
        old, new = before.parameter(name), after.parameter(name)
        frozen_elements = ~selection.masks.draw(name, new.shape)
        return change(old[frozen_elements], new[frozen_elements]).moved > 0

    def types(saved: SavedModel) -> str:
        return " and ".join(sorted({short(saved.dtypes[name]) for name in frozen or after.parameters}))

    units = find_units(after.skeleton)
    totals = [Change.total(part for name in unit.names for part in changes[name]) for unit in units]
    return ModelDiff(
        before.name, after.name, selection, list(zip(units, totals, strict=True)), frozen,
        touched=[name for name in frozen if touched(name)], dtypes=(types(before), types(after)), is_start=is_start,
    )  # fmt: skip
