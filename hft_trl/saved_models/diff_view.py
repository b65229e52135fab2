"""A comparison of saved models as a sentence, tables, JSON and a picture."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hft_trl.demo import shown
from hft_trl.errors import HFTError
from hft_trl.files import check_output, writing
from hft_trl.report.figures import plain, save_figure
from hft_trl.report.movement import change_figure
from hft_trl.report.record import UnitChange
from hft_trl.report.tables import Grid, change, count, percent
from hft_trl.saved_models.diff import Change, ModelDiff
from hft_trl.selection import LAYER_CATEGORIES


def verdict(diff: ModelDiff) -> str:
    """Return a sentence with "frozen half byte-identical" exactly if the frozen half equals the base's."""
    number = len(diff.frozen)
    if diff.byte_identical is None:
        if diff.method is None:
            return f"{diff.tuned}: no hft_selection.json, so nothing says what should have stayed frozen"
        return f"{diff.tuned}: everything learned ({diff.method.upper()}), so nothing should have stayed frozen"
    if diff.byte_identical:
        total = f"{number} of {number} parameters"
        if diff.selection.masked:
            total += f", of {len(diff.selection.masked)} the elements that their masks froze"
        old, new = diff.dtypes
        if old != new:
            total += f", its values bit for bit, {old} in the base and {new} here"
        text = f"{diff.tuned}: frozen half byte-identical to {diff.base} ({total})"
        return text + (f". Note that {_other_start(diff)}" if diff.is_start is False else "")
    if diff.is_start is not False:
        return f"{diff.tuned}: the frozen half is NOT that of {diff.base} ({_touched(diff)})"
    stage = ""
    if diff.stage is not None:
        kept = f"all {number} frozen parameters kept their bits" if diff.stage.byte_identical else _touched(diff.stage)
        stage = f"in its last stage, from {diff.stage.base}, {kept}. "
    return f"{diff.tuned}: {stage}{_other_start(diff)}"


def _touched(diff: ModelDiff) -> str:
    return f"{len(diff.touched)} of {len(diff.frozen)} frozen parameters differ, such as {diff.touched[0]}"


def _other_start(diff: ModelDiff) -> str:
    start = diff.stage.base if diff.stage is not None else shown(diff.selection.start_model["name_or_path"])
    return (
        f"{diff.base} is not the model that its last stage started from, so earlier stages may have changed the "
        f"frozen half: hft-trl diff {shlex.join([start, diff.tuned])} shows that stage alone"
    )


def halves_grid(diff: ModelDiff) -> Grid:
    """Return a table of the halves of the last stage: their change in it, beside that from the base."""
    learned, rows = set(diff.selection.trainable), []
    for half in ("learned", "frozen"):
        stage, whole = (
            Change.total(moved for unit, moved in each.units if (unit.names[0] in learned) == (half == "learned"))
            for each in (diff.stage, diff)
        )
        rows.append([half, count(whole.size), *_pair(stage), *_pair(whole)])
    columns = ["last stage", "parameters", "change in it", "moved", f"from {diff.base}", "moved"]
    return Grid(f"{_title(diff)}: last stage, from {diff.stage.base}", columns, rows)


def layer_grid(diff: ModelDiff) -> Grid:
    """Return a table of change and moved share by layer and category. The last row is the total."""
    cells, totals = diff.grouped()
    categories = [name for name in totals if name in LAYER_CATEGORIES]
    rows = [
        [str(layer), *(text for name in categories for text in _pair(cells.get((layer, name))))]
        for layer in sorted({layer for layer, _ in cells})
    ]
    rows.append(["all", *(text for name in categories for text in _pair(totals[name]))])
    columns = ["layer", *(text for name in categories for text in (name.replace("_", " "), "moved"))]
    return Grid(f"{_title(diff)}: change by layer", columns, rows, frozenset({len(rows) - 1}))


def category_grid(diff: ModelDiff) -> Grid:
    _, totals = diff.grouped()
    rows = [[name, count(total.size), *_pair(total)] for name, total in totals.items()]
    return Grid(f"{_title(diff)}: change by category", ["category", "parameters", "change", "moved"], rows)


def diff_json(diffs: Sequence[ModelDiff]) -> dict[str, Any]:
    return {"base": diffs[0].base, "models": [_model_json(diff) for diff in diffs]}


def _model_json(diff: ModelDiff) -> dict[str, Any]:
    cells, totals = diff.grouped()
    old, new = diff.dtypes
    units = []
    for unit, (_, moved) in zip(_unit_changes(diff), diff.units, strict=True):
        names = ("name", "layer", "category", "slot", "trainable")
        units.append({**{name: getattr(unit, name) for name in names}, **moved.as_json()})
    return {
        "model": diff.tuned,
        "method": diff.method,
        "selection": diff.selection.digest if diff.selection else None,
        "start_model": diff.selection.start_model if diff.selection else None,
        "base_is_start_model": diff.is_start,
        "frozen_half_byte_identical": diff.byte_identical,
        "frozen_parameters": len(diff.frozen),
        "moved_frozen_parameters": diff.touched,
        "dtypes": {"base": old, "model": new},
        "verdict": verdict(diff),
        "last_stage": _model_json(diff.stage) if diff.stage else None,
        "categories": [{"category": name, **moved.as_json()} for name, moved in totals.items()],
        "layers": [{"layer": layer, "category": name, **moved.as_json()} for (layer, name), moved in cells.items()],
        "units": units,
    }


def check_picture(path: str | Path) -> None:
    """Reject a picture that cannot be written, before models are compared."""
    from matplotlib.backend_bases import FigureCanvasBase

    if Path(path).suffix.removeprefix(".").lower() not in FigureCanvasBase.get_supported_filetypes():
        raise HFTError(f"--plot is {str(path)!r}, which does not end in a picture format: use a name as diff.png.")
    check_output("--plot", path, is_file=True)


def write_picture(diffs: Sequence[ModelDiff], path: str | Path) -> None:
    """Draw heat maps of layers by modules, one for each model, on a common scale."""
    figure = change_figure([(plain(_title(diff, 32)), _unit_changes(diff)) for diff in diffs])
    if figure is None:
        raise HFTError(f"--plot is {str(path)!r}, which is not drawn: no layer has a known change.")
    with writing(path, resumes=False):
        save_figure(figure, path)


def _unit_changes(diff: ModelDiff) -> list[UnitChange]:
    learned = set(diff.selection.trainable) if diff.frozen else {name for unit, _ in diff.units for name in unit.names}
    return [
        UnitChange(unit.names[0], unit.layer, unit.category, unit.slot, unit.names[0] in learned, moved.relative)
        for unit, moved in diff.units
    ]


def _title(diff: ModelDiff, width: int | None = None) -> str:
    """Return the model and its method. Of a name longer than `width`, only the end is kept."""
    cut = width is not None and len(diff.tuned) > width
    name = f"...{diff.tuned[-width:]}" if cut else diff.tuned
    return f"{name} ({diff.method.upper()})" if diff.method else name


def _pair(moved: Change | None) -> tuple[str, str]:
    return (change(None), percent(None)) if moved is None else (change(moved.relative), percent(moved.share))
