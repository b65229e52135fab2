"""A picture in characters, layer by layer, of what learns."""

from collections.abc import Collection, Iterable
from string import ascii_lowercase

from hft_trl.report.layer_map import Column, LayerMap, layer_map
from hft_trl.selection import OUTER_CATEGORIES, Unit

SQUARES = "■□·"
ASCII = "#-."


def layer_picture(units: Iterable[Unit], trainable: Collection[str], width: int = 80, marks: str = SQUARES) -> str:
    """
    Draw which units learn: a row a layer, a column a slot, columns grouped by category.

    Where numbered slots such as a mixture's experts share a column, the cell counts: `64/128` is 64 learning units of
    128. Where the short names of the slots don't fit into the width, letters stand for them and a key follows.

    Args:
        units (`Iterable[Unit]`):
            The model's units.
        trainable (`Collection[str]`):
            Names of the parameters that learn.
        width (`int`, *optional*, defaults to `80`):
            Width to keep to where possible, in characters.
        marks (`str`, *optional*, defaults to `"■□·"`):
            Marks for a unit that learns, one that is frozen, and a slot that the layer doesn't have.

    Returns:
        `str`: The picture, without a newline at its end.
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
    """A cell's mark, or a count where it stands for several units."""
    return f"{learning}/{total}" if total > 1 else marks[0 if learning else 1]


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
    """a, b, ..., z, aa, ab, ...: columns named the way spreadsheets do."""
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
