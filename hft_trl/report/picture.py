"""A picture in characters, layer by layer, of what learns."""

from collections.abc import Collection, Iterable
from string import ascii_lowercase

from hft_trl.report.slots import Column, columns_of
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
    inner = [unit for unit in units if unit.layer is not None]
    columns = columns_of((unit.category, unit.slot) for unit in inner)
    counts: dict[tuple[int, Column], list[int]] = {}
    for unit in inner:
        cell = counts.setdefault((unit.layer, columns[unit.category, unit.slot]), [0, 0])
        cell[0] += unit.names[0] in names
        cell[1] += 1
    cells = {place: _cell(*count, marks) for place, count in counts.items()}
    layers = sorted({unit.layer for unit in inner})

    order = list(dict.fromkeys(columns.values()))
    heads = {column: column.label for column in order}
    lines = _grid(order, heads, cells, layers, marks[2])
    key = []
    if max(map(len, lines), default=0) > width:
        heads = {column: _letters(number) for number, column in enumerate(order)}
        lines = _grid(order, heads, cells, layers, marks[2])
        key = _wrap([f"{heads[column]} {column.pattern}" for column in order], width)

    outer = sorted((unit for unit in units if unit.layer is None), key=_outer_rank)
    shown = _wrap([f"{marks[unit.names[0] not in names]} {_module(unit)}" for unit in outer], width)
    text = "\n".join(lines)
    legend = [f"{marks[0]} learns", f"{marks[1]} frozen"]
    if any(marks[2] in line.split() for line in lines):
        legend.append(f"{marks[2]} no such unit")
    if any(total > 1 for _, total in counts.values()):
        legend.append("1/8 one of eight units learns")
    parts = [text, "\n".join(key), "\n".join(shown), "   ".join(legend)]
    return "\n\n".join(part for part in parts if part)


def _cell(trained: int, total: int, marks: str) -> str:
    return f"{trained}/{total}" if total > 1 else marks[0 if trained else 1]


def _grid(
    order: list[Column],
    heads: dict[Column, str],
    cells: dict[tuple[int, Column], str],
    layers: list[int],
    absent: str,
) -> list[str]:
    widths = {
        column: max(len(heads[column]), *(len(cells.get((layer, column), absent)) for layer in layers))
        for column in order
    }
    groups: dict[str, list[Column]] = {}
    for column in order:
        groups.setdefault(column.category, []).append(column)

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
    body = [row(str(layer), {column: cells.get((layer, column), absent) for column in order}) for layer in layers]
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
