"""What fine-tuning changed: two saved models compared tensor by tensor, and whether the frozen half kept its bits."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from hft_trl.checkpoints.whole import selection_of
from hft_trl.errors import HFTError
from hft_trl.saved_models.saved_model import SavedModel, check_alike
from hft_trl.selection import LAYER_CATEGORIES, OUTER_CATEGORIES, Selection, Unit, find_units
from hft_trl.weights import Change, change


@dataclass(frozen=True)
class Moved:
    """
    How far some parameters moved, taken together.

    Args:
        difference, base (`float`):
            Norms (L2) of the task vector (tuned minus base) and of the base's weights.
        moved, size (`int`):
            Number of values that differ in a bit, and of all.
    """

    difference: float
    base: float
    moved: int
    size: int

    @classmethod
    def total(cls, parts: "Iterable[Change | Moved]") -> "Moved":
        """Several taken together."""
        parts = list(parts)
        difference = math.sqrt(sum(part.difference**2 for part in parts))
        base = math.sqrt(sum(part.base**2 for part in parts))
        return cls(difference, base, sum(part.moved for part in parts), sum(part.size for part in parts))

    @property
    def relative(self) -> float | None:
        """`float` or `None`: The task vector's norm over the weights', `None` where that is undefined."""
        relative = self.difference / self.base if self.base else math.nan
        return relative if math.isfinite(relative) else None

    @property
    def share(self) -> float:
        """`float`: The share of values that moved, in [0, 1]."""
        return self.moved / self.size if self.size else 0.0

    def as_json(self) -> dict[str, Any]:
        """The figures by name."""
        return {
            "relative_change": self.relative,
            "moved_share": self.share,
            "moved": self.moved,
            "parameters": self.size,
        }


@dataclass(frozen=True)
class ModelDiff:
    """
    A tuned model beside its base.

    Args:
        base, tuned (`str`):
            The two models, as the user named them.
        selection ([`Selection`], *optional*):
            What the tuned model was trained with, `None` if it holds no `hft_selection.json`.
        units (`list[tuple[Unit, Moved]]`):
            How far each unit moved.
        frozen (`list[str]`):
            Names of the parameters that the selection kept from learning, as a whole or in some of their elements.
        touched (`list[str]`):
            Those of them that differ from the base in a bit that was frozen.
        dtypes (`tuple[str, str]`):
            Types of the frozen parameters (of all, if none is frozen) in the base's and in the tuned model's files.
        is_start (`bool`, *optional*):
            Whether the base is the very model that the selection says training started from, by its weights' digest.
            `None` without a digest, or where it can't be computed from the files.
    """

    base: str
    tuned: str
    selection: Selection | None
    units: list[tuple[Unit, Moved]]
    frozen: list[str]
    touched: list[str]
    dtypes: tuple[str, str]
    is_start: bool | None

    @property
    def method(self) -> str | None:
        """`str` or `None`: `"hft"`, `"fft"`, or `None` if the model holds no selection."""
        return self.selection.config.method if self.selection else None

    @property
    def byte_identical(self) -> bool | None:
        """`bool` or `None`: Whether the frozen half is the base's, `None` where nothing was frozen."""
        return not self.touched if self.frozen else None

    def grouped(self) -> tuple[dict[tuple[int, str], Moved], dict[str, Moved]]:
        """The units together by layer and category, and by category alone."""
        cells: dict[tuple[int, str], list[Moved]] = {}
        categories: dict[str, list[Moved]] = {}
        for unit, moved in self.units:
            categories.setdefault(unit.category, []).append(moved)
            if unit.layer is not None:
                cells.setdefault((unit.layer, unit.category), []).append(moved)
        order = [name for name in (*LAYER_CATEGORIES, *OUTER_CATEGORIES) if name in categories]
        return (
            {place: Moved.total(parts) for place, parts in sorted(cells.items())},
            {name: Moved.total(categories[name]) for name in order},
        )


def compare(base: str, tuned: Iterable[str]) -> list[ModelDiff]:
    """
    Compare tuned models with their base, a piece of a tensor at a time. No model is loaded.

    Args:
        base (`str`):
            Folder, hub id in the local cache, or `"demo"`.
        tuned (`Iterable[str]`):
            The tuned models, the same way.

    Returns:
        `list[ModelDiff]`: One for each tuned model.

    Raises:
        [`HFTError`]: If a tuned model differs from the base in architecture, vocabulary or shapes, or if its selection is
            another model's.
    """
    before = SavedModel(base)
    pairs = [(SavedModel(name), name) for name in tuned]
    for after, _ in pairs:
        check_alike(before, after)
    return [_compare(before, after) for after, _ in pairs]


def _compare(before: SavedModel, after: SavedModel) -> ModelDiff:
    names = [name for name, _ in after.skeleton.named_parameters()]
    selection = selection_of(after.skeleton)
    frozen = _frozen(selection, names, after.name)
    pieces: dict[tuple[str, str], Change] = {}
    for key, place in logging.tqdm(after.places.items(), desc=f"Comparing {after.name}", disable=None, leave=False):
        # A file may hold a tied parameter under each of its names: counted once, and loaded by its first.
        if key == place.parameter or (place.parameter, place.piece) not in pieces:
            old, new = before.tensor(before.counterpart(key, place)), after.tensor(key)
            pieces[place.parameter, place.piece] = change(key, old, new)
    changes: dict[str, list[Change]] = {}
    for (name, _), found in pieces.items():
        changes.setdefault(name, []).append(found)
    unknown = next((name for name in frozen if name not in changes), None)
    if unknown is not None:
        raise HFTError(
            f"{unknown} is frozen in {after.name!r}, but no file holds it, so nothing can be said of it: save the model anew."
        )
    units = [
        (unit, Moved.total(part for name in unit.names for part in changes.get(name, [])))
        for unit in find_units(after.skeleton)
    ]
    return ModelDiff(
        base=before.name,
        tuned=after.name,
        selection=selection,
        units=units,
        frozen=frozen,
        touched=[
            name
            for name in frozen
            if (
                _masked_moved(before, after, name, selection)
                if name in selection.masked
                else any(part.moved for part in changes.get(name, []))
            )
        ],
        dtypes=(_types(before, frozen or names), _types(after, frozen or names)),
        is_start=_is_start(before, after, selection.start_model if selection else None),
    )


def _is_start(before: SavedModel, after: SavedModel, start: dict[str, str] | None) -> bool | None:
    """Compares the digests; in which type training held the weights is tried, since only their digest is known."""
    if start is None or start["weights_digest"] is None:
        return None
    known: dict[str, str | None] = {}
    for dtypes in (after.dtypes(), before.dtypes(), dict.fromkeys(after.dtypes(), torch.float32)):
        kinds = str(sorted(dtypes.items(), key=str))
        if kinds not in known:
            known[kinds] = before.digest(dtypes)
            if known[kinds] == start["weights_digest"]:
                return True
    return None if None in known.values() else False


def _frozen(selection: Selection | None, names: list[str], model: str) -> list[str]:
    """What did not learn: more than what the selection calls frozen, since what it leaves out did not learn either."""
    if selection is None or selection.config.method == "fft":
        return []
    unknown = {*selection.trainable, *selection.frozen}.difference(names)
    if unknown:
        raise HFTError(
            f"the selection in {model!r} names {min(unknown)}, which the model lacks: it is another model's."
        )
    learns = set(selection.trainable) - selection.masked.keys()
    return [name for name in names if name not in learns]


def _masked_moved(before: SavedModel, after: SavedModel, name: str, selection: Selection) -> bool:
    """Whether an element that its mask kept from learning differs."""
    old, new = before.parameter(name), after.parameter(name)
    frozen = ~selection.masks.draw(name, new.shape)
    return change(name, old[frozen], new[frozen]).moved > 0


def _types(saved: SavedModel, names: Iterable[str]) -> str:
    dtypes = saved.dtypes()
    found = {str(dtypes[name]).removeprefix("torch.") for name in names if name in dtypes}
    return " and ".join(sorted(found))
