"""Show which units of each layer learn, as cells (layers by slots) and as text."""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from string import ascii_lowercase

from hft_trl.selection import LAYER_CATEGORIES, OUTER_CATEGORIES, Unit

# Number of slots above which a category's numbered slots (experts.17.up_proj) share a column
FOLD_ABOVE = 12

SQUARES = "■□·"
ASCII = "#-."

_ABBREVIATIONS = (("feed_?forward", "ffn"), ("attention", "attn"), ("layer_?norm", "norm"))


@dataclass(frozen=True)
class Column:
    """Describe a column. `pattern` is the slot, with `*` for folded numbers: `experts.*.up_proj`."""

    category: str
    pattern: str
    label: str


def columns_of(slots: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Column]:
    """Return the column of each pair of category and slot, by category and then first occurrence."""
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
    """Store how many units learn and how many exist, for each layer and column."""

    columns: list[Column]
    layers: list[int]
    cells: dict[tuple[int, Column], tuple[int, int]]

    def groups(self) -> dict[str, list[Column]]:
        """Return the columns of each category, in the order of the picture."""
        groups: dict[str, list[Column]] = {}
        for column in self.columns:
            groups.setdefault(column.category, []).append(column)
        return groups


def layer_map(units: Iterable[tuple[int, str, str, bool]]) -> LayerMap:
    """Arrange units inside the layers, each given as layer, category, slot and whether it learns."""
    units = list(units)
    columns = columns_of((category, slot) for _, category, slot, _ in units)
    cells: dict[tuple[int, Column], tuple[int, int]] = {}
    for layer, category, slot, learns in units:
        place = layer, columns[category, slot]
        learning, total = cells.get(place, (0, 0))
        cells[place] = learning + learns, total + 1
    return LayerMap(list(dict.fromkeys(columns.values())), sorted({layer for layer, *_ in units}), cells)


def layer_picture(units: Iterable[Unit], trainable: Collection[str], width: int = 80, marks: str = SQUARES) -> str:
    """
    Draw which units learn: a row per layer, a column per slot, columns grouped by category.

    In columns of several units, `64/128` is 64 learning units of 128. Labels too long for `width` become letters.
    `marks` are those of a unit that learns, one that is frozen, and a slot that the layer does not have.
    """
    units, names = list(units), frozenset(trainable)
    inner = layer_map(
        (unit.layer, unit.category, unit.slot, unit.names[0] in names) for unit in units if unit.layer is not None
    )
    cells = {place: cell_mark(*counts, marks) for place, counts in inner.cells.items()}

    heads = {column: column.label for column in inner.columns}
    lines = _grid(inner, heads, cells, marks[2])
    key = []
    if max(map(len, lines), default=0) > width:
        heads = {column: _letters(number) for number, column in enumerate(inner.columns)}
        lines = _grid(inner, heads, cells, marks[2])
        key = _wrap([f"{heads[column]} {column.pattern}" for column in inner.columns], width)

    outer = sorted((unit for unit in units if unit.layer is None), key=_outer_rank)
    shown = _wrap([f"{marks[unit.names[0] not in names]} {_module(unit)}" for unit in outer], width)
    text = "\n".join(lines)
    legend = [f"{marks[0]} learns", f"{marks[1]} frozen"]
    if any(marks[2] in line.split() for line in lines):
        legend.append(f"{marks[2]} no such unit")
    if any(total > 1 for _, total in inner.cells.values()):
        legend.append("1/8 one of eight units learns")
    parts = [text, "\n".join(key), "\n".join(shown), "   ".join(legend)]
    return "\n\n".join(part for part in parts if part)


def cell_mark(learning: int, total: int, marks: str = SQUARES) -> str:
    """Return a cell's mark, or a count if it has several units."""
    return f"{learning}/{total}" if total > 1 else marks[0 if learning else 1]


def _rank(category: str) -> tuple[int, str]:
    order = LAYER_CATEGORIES + OUTER_CATEGORIES
    return (order.index(category) if category in order else len(order), category)


def _labels(patterns: list[str]) -> dict[str, str]:
    """Return the shortest label for each pattern that no other pattern has."""
    parts = {pattern: _parts(pattern) for pattern in patterns}
    leaves = [names[-1] for names in parts.values()]
    # Folded slots need their parent's name: "gate" alone looks like a mixture's router
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
    """Drop an ending that repeats the category, unless another name begins with the rest."""
    short = re.sub(r"_(proj|layer_?norm|norm)$", "", leaf)
    if any(other != leaf and other.startswith(f"{short}_") for other in leaves):
        short = leaf
    return _abbreviate(short)


def _abbreviate(name: str) -> str:
    for long, short in _ABBREVIATIONS:
        name = re.sub(long, short, name)
    return name


def _grid(inner: LayerMap, heads: dict[Column, str], cells: dict[tuple[int, Column], str], absent: str) -> list[str]:
    widths = {
        column: max(len(heads[column]), *(len(cells.get((layer, column), absent)) for layer in inner.layers))
        for column in inner.columns
    }
    groups = inner.groups()

    def row(first: str, texts: dict[Column, str]) -> str:
        parts = [
            " ".join(texts[column].ljust(widths[column]) for column in members).ljust(len(category))
            for category, members in groups.items()
        ]
        return f"{first:>5}  {'  '.join(parts)}".rstrip()

    sizes = {
        category: max(len(category), sum(widths[column] + 1 for column in members) - 1)
        for category, members in groups.items()
    }
    top = f"layer  {'  '.join(category.ljust(size) for category, size in sizes.items())}".rstrip()
    body = [
        row(str(layer), {column: cells.get((layer, column), absent) for column in inner.columns})
        for layer in inner.layers
    ]
    return [top, row("", heads), *body]


def _letters(number: int) -> str:
    """Return a, b, ..., z, aa, ab, ..., as spreadsheets name columns."""
    number, last = divmod(number, len(ascii_lowercase))
    return (_letters(number - 1) if number else "") + ascii_lowercase[last]


def _wrap(entries: list[str], width: int) -> list[str]:
    lines: list[str] = []
    for entry in entries:
        if lines and len(lines[-1]) + 3 + len(entry) <= width:
            lines[-1] += f"   {entry}"
        else:
            lines.append(entry)
    return lines


def _outer_rank(unit: Unit) -> tuple[int, str]:
    return (OUTER_CATEGORIES.index(unit.category), unit.names[0])


def _module(unit: Unit) -> str:
    return unit.names[0].removesuffix(".weight")
