"""Changes from fine-tuning, and whether the frozen half kept its bits."""

import dataclasses
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging

from hft_trl import demo
from hft_trl.errors import HFTError
from hft_trl.saved_models.comparison import Change, change, check_alike
from hft_trl.saved_models.saved_model import SavedModel, short
from hft_trl.selection import LAYER_CATEGORIES, OUTER_CATEGORIES, Selection, Unit, find_units
from hft_trl.selection.previous import selection_of


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
    stage: "ModelDiff | None" = None  # from the model that the last stage started from, if another one that is there

    @property
    def method(self) -> str | None:
        """Return `"hft"` or `"fft"`, or `None` if the model has no selection."""
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
        order = [name for name in (*LAYER_CATEGORIES, *OUTER_CATEGORIES) if name in categories]
        return (
            {place: Change.total(parts) for place, parts in sorted(cells.items())},
            {name: Change.total(categories[name]) for name in order},
        )


def compare(base: str, tuned: Iterable[str]) -> list[ModelDiff]:
    """
    Compare tuned models with their base in chunks of a tensor, without loading a model.

    A model is a folder, a hub id in the local cache, `"demo"` or `"smollm2"`. Models that differ in
    architecture, vocabulary or shapes, and selections of other models, raise an [`HFTError`].
    """
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
    """Return whether a model's last stage started from another one, `None` if its selection does not tell."""
    selection = selection_of(after.skeleton)
    if selection is None or not selection.start_model or not selection.start_model["weights_digest"]:
        return None
    # The start model was hashed in the type of training
    held = [after.dtypes(), before.dtypes(), dict.fromkeys(after.parameters, torch.float32)]
    distinct = [dtypes for number, dtypes in enumerate(held) if dtypes not in held[:number]]
    return any(before.digest(dtypes) == selection.start_model["weights_digest"] for dtypes in distinct)


def _find_start(after: SavedModel) -> SavedModel | None:
    """Return the folder that a model's last stage started from, which may have moved together with the model's."""
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
    frozen = _frozen(selection, after)
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
        return " and ".join(sorted({short(saved.dtypes()[name]) for name in frozen or after.parameters}))

    return ModelDiff(
        base=before.name,
        tuned=after.name,
        selection=selection,
        units=[
            (unit, Change.total(part for name in unit.names for part in changes[name]))
            for unit in find_units(after.skeleton)
        ],
        frozen=frozen,
        touched=[name for name in frozen if touched(name)],
        dtypes=(types(before), types(after)),
        is_start=is_start,
    )


def _frozen(selection: Selection | None, saved: SavedModel) -> list[str]:
    """Return the parameters that are frozen, masked or not in the selection."""
    if selection is None or selection.config.method == "fft":
        return []
    unknown = {*selection.trainable, *selection.frozen}.difference(saved.parameters)
    if unknown:
        raise HFTError(
            f"the selection in {saved.name!r} names {min(unknown)}, which the model lacks: it is another model's."
        )
    learns = set(selection.trainable) - selection.masked.keys()
    return [name for name in saved.parameters if name not in learns]
