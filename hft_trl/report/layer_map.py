"""The rows and columns of a layer picture: layers by slots, grouped by category, with short labels, and what learns."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from hft_trl.selection import LAYER_CATEGORIES, OUTER_CATEGORIES

# A category with more slots than this has its numbered slots (experts.17.up_proj) folded into one column.
FOLD_ABOVE = 12

_ABBREVIATIONS = (("feed_?forward", "ffn"), ("attention", "attn"), ("layer_?norm", "norm"))


@dataclass(frozen=True)
class Column:
    """
    One column of a layer picture.

    Args:
        category (`str`):
            Category of its units.
        pattern (`str`):
            The slot, with `*` for the numbers that were folded: `experts.*.up_proj`.
        label (`str`):
            Short name, unique inside the category.
    """

    category: str
    pattern: str
    label: str


def columns_of(slots: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Column]:
    """
    Give every slot of a model's layers its column.

    Args:
        slots (`Iterable[tuple[str, str]]`):
            Pairs of category and slot, in any order and with repeats.

    Returns:
        `dict[tuple[str, str], Column]`: The column of each pair, in the order of the picture: by category, then as met
        first. Several slots share a column where numbered slots were folded.
    """
    by_category: dict[str, list[str]] = {}
    for category, slot in dict.fromkeys(slots):
        by_category.setdefault(category, []).append(slot)
    columns = {}
    for category in sorted(by_category, key=_rank):
        names = by_category[category]
        fold = len(names) > FOLD_ABOVE
        patterns = {slot: re.sub(r"(?<![^.])\d+(?![^.])", "*", slot) if fold else slot for slot in names}
        labels = _labels(list(dict.fromkeys(patterns.values())))
        for pattern, label in labels.items():
            column = Column(category, pattern, label)
            columns.update({(category, slot): column for slot in names if patterns[slot] == pattern})
    return columns


@dataclass(frozen=True)
class LayerMap:
    """
    Which units of the layers learn, as the cells of a picture.

    Args:
        columns (`list[Column]`):
            Columns, grouped by category.
        layers (`list[int]`):
            Running numbers of the layers.
        cells (`dict[tuple[int, Column], tuple[int, int]]`):
            For each layer and column that exists, how many units learn, and of how many.
    """

    columns: list[Column]
    layers: list[int]
    cells: dict[tuple[int, Column], tuple[int, int]]

    def groups(self) -> dict[str, list[Column]]:
        """`dict[str, list[Column]]`: The columns of each category, in the order of the picture."""
        groups: dict[str, list[Column]] = {}
        for column in self.columns:
            groups.setdefault(column.category, []).append(column)
        return groups


def layer_map(units: Iterable[tuple[int, str, str, bool]]) -> LayerMap:
    """
    Arrange what learns by layer and slot.

    Args:
        units (`Iterable[tuple[int, str, str, bool]]`):
            For each unit inside the layers its layer, category and slot, and whether it learns.

    Returns:
        [`LayerMap`]: The cells; those of slots that share a column count several units.
    """
    units = list(units)
    columns = columns_of((category, slot) for _, category, slot, _ in units)
    cells: dict[tuple[int, Column], tuple[int, int]] = {}
    for layer, category, slot, learns in units:
        place = layer, columns[category, slot]
        learning, total = cells.get(place, (0, 0))
        cells[place] = learning + learns, total + 1
    return LayerMap(list(dict.fromkeys(columns.values())), sorted({layer for layer, *_ in units}), cells)


def _rank(category: str) -> tuple[int, str]:
    order = LAYER_CATEGORIES + OUTER_CATEGORIES
    return (order.index(category) if category in order else len(order), category)


def _labels(patterns: list[str]) -> dict[str, str]:
    """The shortest label for each pattern that no other pattern has."""
    parts = {pattern: _parts(pattern) for pattern in patterns}
    leaves = [names[-1] for names in parts.values()]
    # What was folded is named with its owner: "gate" alone would be read as a mixture's router.
    depths = {pattern: 2 if "*" in pattern else 1 for pattern in patterns}
    labels: dict[str, str] = {}
    for _ in range(max(map(len, parts.values()))):
        for pattern, names in parts.items():
            *owners, leaf = names[-depths[pattern] :]
            labels[pattern] = ".".join([*map(_abbreviate, owners), _shorten(leaf, leaves)])
        taken = Counter(labels.values())
        depths = {pattern: depth + (taken[labels[pattern]] > 1) for pattern, depth in depths.items()}
    return {pattern: pattern if taken[label] > 1 else label for pattern, label in labels.items()}


def _parts(pattern: str) -> list[str]:
    return [part for part in pattern.split(".") if part != "*"] or [pattern]


def _shorten(leaf: str, leaves: Iterable[str]) -> str:
    """Drop the ending that says what the category says already, unless what is left begins another name too."""
    short = re.sub(r"_(proj|layer_?norm|norm)$", "", leaf)
    if any(other != leaf and other.startswith(f"{short}_") for other in leaves):
        short = leaf
    return _abbreviate(short)


def _abbreviate(name: str) -> str:
    for long, short in _ABBREVIATIONS:
        name = re.sub(long, short, name)
    return name
