"""Arrange the units of a model as layers by slots, and show as text which of them learn."""

import itertools
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from string import ascii_letters
from typing import Generic, TypeVar

from hft_trl.report.record import UnitChange
from hft_trl.selection import LAYER_CATEGORIES, OUTER_CATEGORIES, Unit

# Number of slots above which a category's numbered slots (experts.17.up_proj) share a column
FOLD_ABOVE = 12

SQUARES = "■□·"
ASCII = "#-."

T = TypeVar("T", Unit, UnitChange)


@dataclass(frozen=True)
class Column:
    """Describe a column. `pattern` is the slot, with `*` for folded numbers: `experts.*.up_proj`."""

    category: str
    pattern: str
    label: str


@dataclass(frozen=True)
class LayerMap(Generic[T]):
    """Store the units of each layer and column, and the columns of each category in order."""

    groups: dict[str, list[Column]]
    layers: list[int]
    cells: dict[tuple[int, Column], list[T]]

    @property
    def columns(self) -> list[Column]:
        """Return the columns of all categories."""
        return [column for columns in self.groups.values() for column in columns]


def layer_map(units: Iterable[T]) -> LayerMap[T]:
    """Arrange the units inside the layers, by category and then first occurrence."""
    inner = [unit for unit in units if unit.layer is not None]
    groups: dict[str, list[Column]] = {}
    found: dict[tuple[str, str], Column] = {}
    for category in sorted({unit.category for unit in inner}, key=category_rank):
        slots = list(dict.fromkeys(unit.slot for unit in inner if unit.category == category))
        fold = len(slots) > FOLD_ABOVE
        patterns = {slot: re.sub(r"(?<![^.])\d+(?![^.])", "*", slot) if fold else slot for slot in slots}
        labels = _labels(list(dict.fromkeys(patterns.values())))
        columns = {pattern: Column(category, pattern, label) for pattern, label in labels.items()}
        groups[category] = list(columns.values())
        found.update({(category, slot): columns[pattern] for slot, pattern in patterns.items()})
    cells: dict[tuple[int, Column], list[T]] = {}
    for unit in inner:
        cells.setdefault((unit.layer, found[unit.category, unit.slot]), []).append(unit)
    return LayerMap(groups, sorted({unit.layer for unit in inner}), cells)


def category_rank(category: str) -> tuple[int, str]:
    """Return the place of a category in tables and pictures: inside the layers, outside, unknown."""
    order = LAYER_CATEGORIES + OUTER_CATEGORIES
    return (order.index(category) if category in order else len(order), category)


def layer_picture(units: Iterable[T], learns: Callable[[T], bool], width: int = 80, marks: str = SQUARES) -> str:
    """
    Draw which units learn: a row per layer, a column per slot, columns grouped by category.

    In columns of several units, `64/128` is 64 learning units of 128. Labels too long for `width` become letters.
    `marks` are those of a unit that learns, one that is frozen, and a slot that the layer does not have.
    """
    units = list(units)
    grid = layer_map(units)
    cells = {}
    for place, members in grid.cells.items():
        learning = sum(map(learns, members))
        cells[place] = f"{learning}/{len(members)}" if len(members) > 1 else marks[not learning]
    heads = {column: column.label for column in grid.columns}
    lines = _lines(grid, heads, cells, marks[2])
    key: list[str] = []
    if max(map(len, lines)) > width:
        heads = dict(zip(grid.columns, itertools.chain(ascii_letters, map(str, itertools.count(1))), strict=False))
        lines = _lines(grid, heads, cells, marks[2])
        key = [f"{head} {column.pattern}" for column, head in heads.items()]
    outer = sorted((u for u in units if u.layer is None), key=lambda u: (category_rank(u.category), u.slot))
    shown = [f"{marks[not learns(unit)]} {unit.slot}" for unit in outer]
    legend = [f"{marks[0]} learns", f"{marks[1]} frozen"]
    if any(marks[2] in line.split() for line in lines):
        legend.append(f"{marks[2]} no such unit")
    if any("/" in mark for mark in cells.values()):
        legend.append("1/8 one of eight units learns")
    layers = "\n".join(lines) if grid.layers else ""
    parts = [layers, _wrap(key, width), _wrap(shown, width), "   ".join(legend)]
    return "\n\n".join(part for part in parts if part)


def _labels(patterns: list[str]) -> dict[str, str]:
    """Return the shortest label for each pattern that no other pattern has."""
    parts = {pattern: [part for part in pattern.split(".") if part != "*"] or [pattern] for pattern in patterns}
    leaves = [names[-1] for names in parts.values()]
    # Folded slots need their parent's name: "gate" alone looks like a mixture's router
    depths = {pattern: 2 if "*" in pattern else 1 for pattern in patterns}
    for _ in range(max(map(len, parts.values()))):
        labels = {
            pattern: _abbreviate(".".join([*names[-depths[pattern] : -1], _shorten(names[-1], leaves)]))
            for pattern, names in parts.items()
        }
        taken = Counter(labels.values())
        depths = {pattern: depth + (taken[labels[pattern]] > 1) for pattern, depth in depths.items()}
    return {pattern: pattern if taken[label] > 1 else label for pattern, label in labels.items()}


def _shorten(leaf: str, leaves: Iterable[str]) -> str:
    """Drop an ending that repeats the category, unless another name begins with the rest."""
    short = re.sub(r"_(proj|layer_?norm|norm)$", "", leaf)
    return leaf if any(other != leaf and other.startswith(f"{short}_") for other in leaves) else short


def _abbreviate(name: str) -> str:
    for long, short in (("feed_?forward", "ffn"), ("attention", "attn"), ("layer_?norm", "norm")):
        name = re.sub(long, short, name)
    return name


def _lines(
    grid: LayerMap[T], heads: dict[Column, str], cells: dict[tuple[int, Column], str], absent: str
) -> list[str]:
    """Return the categories, the heads of the columns, and a line for each layer."""
    rows = [heads, *({column: cells.get((layer, column), absent) for column in heads} for layer in grid.layers)]
    blocks = [[f"{text:>5}" for text in ("layer", "", *grid.layers)]]
    for category, columns in grid.groups.items():
        widths = {column: max(len(row[column]) for row in rows) for column in columns}
        block = [category, *(" ".join(row[column].ljust(widths[column]) for column in columns) for row in rows)]
        blocks.append([text.ljust(max(map(len, block))) for text in block])
    return ["  ".join(parts).rstrip() for parts in zip(*blocks, strict=True)]


def _wrap(entries: list[str], width: int) -> str:
    """Put as many entries on each line as fit. Spaces inside an entry do not end a line."""
    text = "   ".join(entry.replace(" ", "\xa0") for entry in entries)
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False).replace("\xa0", " ")
