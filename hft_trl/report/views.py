"""Write a report as Markdown and as one self-contained web page."""

import io
from base64 import b64encode
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from hft_trl.demo import shown
from hft_trl.report.layer_map import SQUARES, Column, cell_mark, layer_map
from hft_trl.report.movement import movement_figure
from hft_trl.report.plots import MARGIN, evaluation_figure, loss_figure, margin_figure, retention_figure
from hft_trl.report.record import REPORT_FILE, Report, StageRecord, UnitChange
from hft_trl.report.sections import CAPTIONS, Block, sections
from hft_trl.report.tables import loss, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_FILE = "report.html"
TEMPLATE = "page.html.jinja"
# Inches: a picture of this width is readable on a phone (360 pixels)
NARROW = 4.2
# Inches: the largest width that fits the page on a large screen
WIDE = 11.0
CSS_PIXELS = 96


@dataclass(frozen=True)
class Drawing:
    """Store a picture of the page. Sizes are CSS pixels, and below `min_width` the picture scrolls."""

    source: str
    alt: str
    width: int
    height: int
    min_width: int


@dataclass(frozen=True)
class SelectionMap:
    """
    Store which matrices of a stage learned, as rows of formatted cells.

    A cell is a state (`"on"`, `"off"`, `"part"` or `"absent"`), a mark, and whether a category begins there. `outside`
    has state, mark and name of each unit outside the layers.
    """

    stage: str
    groups: dict[str, list[Column]]
    rows: list[tuple[int, list[tuple[str, str, bool]]]]
    outside: list[tuple[str, str, str]]


def report_markdown(report: Report, pictures: Collection[str]) -> str:
    """Write a report as Markdown. `pictures` are the names of the pictures in the same folder."""
    methods = ", ".join(f"{stage.name} with {stage.method.upper()}" for stage in report.stages)
    parts = [
        "# Fine-tuning report",
        f"{methods or 'No stage'}, from `{shown(report.base_model) or 'an unnamed model'}`, {report.created}. "
        f"Every figure below comes from `{REPORT_FILE}`.",
    ]
    for section in sections(report):
        blocks = [text for block in section.blocks if (text := _markdown(block, pictures))]
        parts += [f"## {section.title}", *blocks] if blocks else []
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block, pictures: Collection[str]) -> str:
    if block.kind == "heading":
        return f"### {block.text}"
    if block.kind == "table":
        return f"{block.text}:\n\n{table(block.grid)}"
    if block.kind == "picture":
        name = block.text
        return f"![{name.removesuffix('.png')}]({name})\n\n*{CAPTIONS[name]}*" if name in pictures else ""
    if block.kind == "code":
        fence = "```"
        while fence in block.text:
            fence += "`"
        return f"{fence}{block.language}\n{block.text}\n{fence}"
    return block.text


def report_page(report: Report) -> str:
    """Write a report as one HTML page without scripts. The same report gives the same bytes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    maps = [selection_map(stage) for stage in report.stages if stage.moved]
    draw = {
        "evaluation.png": _score_drawings,
        "loss.png": _loss_drawings,
        "margins.png": _margin_drawings,
        "moved.png": _movement_drawings,
        "retention.png": _retention_drawings,
    }
    shown_sections = sections(report)
    pictures = [block.text for section in shown_sections for block in section.blocks if block.kind == "picture"]
    return templates.get_template(TEMPLATE).render(
        report=report,
        source=REPORT_FILE,
        shown=shown,
        captions=CAPTIONS,
        verdict=verdict(report),
        sections=shown_sections,
        drawings={name: list(draw[name](report)) for name in pictures},
        maps=maps,
        states={state for chart in maps for state in _states(chart)},
        marks=SQUARES,
    )


def verdict(report: Report) -> tuple[str, str]:
    """Return whether the frozen half is unchanged (`"good"`, `"bad"` or `"none"`), and a sentence."""
    broken = [stage.name for stage in report.stages if stage.frozen_unchanged is False]
    kept = [stage.name for stage in report.stages if stage.frozen_unchanged]
    if broken:
        return "bad", f"The frozen half did not stay unchanged: {', '.join(broken)}."
    if kept:
        stages = "every stage" if len(kept) == len(report.stages) else ", ".join(kept)
        return "good", f"What was frozen is unchanged, bit for bit, in {stages}."
    return "none", "Nothing was frozen."


def selection_map(stage: StageRecord) -> SelectionMap:
    """Arrange which matrices of a stage learned: a row per layer, a column per slot."""
    inner = layer_map((u.layer, u.category, u.slot, u.trainable) for u in stage.moved if u.layer is not None)
    groups = inner.groups()
    first = {members[0] for members in groups.values()}
    columns = [column for members in groups.values() for column in members]
    rows = []
    for layer in inner.layers:
        counts = [inner.cells.get((layer, column)) for column in columns]
        cells = [(*_state(count), column in first) for column, count in zip(columns, counts, strict=True)]
        rows.append((layer, cells))
    outside = [(*_state((int(unit.trainable), 1)), _module(unit)) for unit in stage.moved if unit.layer is None]
    title = f"{stage.name} ({stage.method.upper()})"
    if (
        rows
        and all(unit.trainable for unit in stage.moved if unit.layer is not None)
        and stage.share.get("layers", 1) < 1
    ):
        # With masks, all matrices learn, but not all of their elements
        title += f": in the layers {stage.share['layers']:.0%} of the elements of each matrix"
    return SelectionMap(title, groups, rows, outside)


def _state(count: tuple[int, int] | None) -> tuple[str, str]:
    if count is None:
        return "absent", SQUARES[2]
    learning, total = count
    return "on" if learning == total else "part" if learning else "off", cell_mark(learning, total)


def _states(chart: SelectionMap) -> set[str]:
    return {state for _, cells in chart.rows for state, *_ in cells} | {state for state, *_ in chart.outside}


def _module(unit: UnitChange) -> str:
    return unit.name.removesuffix(".weight")


def _score_drawings(report: Report) -> Iterator[Drawing]:
    """Yield the scores of each suite, or of all without suites."""
    for name, measures in report.suites.items() or [("", None)]:
        part = report
        if measures:
            rows = {model: {key: row.get(key) for key in measures} for model, row in report.evaluation.items()}
            part = replace(report, suites={name: measures}, evaluation=rows)
        figure = evaluation_figure(part)
        if figure is None:
            continue
        axes = figure.axes[0]
        width = max(NARROW, 1.2 + 0.45 * len(axes.texts))
        figure.set_size_inches(min(WIDE, width), 3.6)
        for text in axes.texts:
            text.set_fontsize(9 if width < WIDE else 6)
        which = f"Bars of the scores in {name}" if name else "Bars of the scores"
        yield _drawing(figure, f"{which} of {', '.join(report.evaluation)}; the table has them as numbers.")


def _loss_drawings(report: Report) -> Iterator[Drawing]:
    for stage in report.stages:
        figure = loss_figure(replace(report, stages=[stage]))
        if figure is not None:
            figure.set_size_inches(NARROW, 3.2)
            span = f"from {loss(stage.first_loss)} to {loss(stage.last_loss)} in {stage.steps} steps"
            yield _drawing(figure, f"Training loss of {stage.name}, {span}.")


def _margin_drawings(report: Report) -> Iterator[Drawing]:
    for stage in report.stages:
        figure = margin_figure(replace(report, stages=[stage]))
        if figure is not None:
            figure.set_size_inches(NARROW, 3.2)
            margins = [row[MARGIN] for row in stage.history if row.get(MARGIN) is not None]
            yield _drawing(figure, f"Reward margin of {stage.name}, from {loss(margins[0])} to {loss(margins[-1])}.")


def _retention_drawings(report: Report) -> Iterator[Drawing]:
    figure = retention_figure(report)
    if figure is not None:
        yield _drawing(figure, "Retention over the steps of all stages; the table has the last figures of each stage.")


def _movement_drawings(report: Report) -> Iterator[Drawing]:
    for stage in report.stages:
        figure = movement_figure(report, stage)
        if figure is not None:
            alt = (
                f"Change from the base after {stage.name}: layers by matrices, and means by category as in the table."
            )
            width, height = figure.get_size_inches()
            figure.set_size_inches(max(NARROW, width - 1.2), height)
            yield _drawing(figure, alt)


def _drawing(figure: "Figure", alt: str) -> Drawing:
    from matplotlib import rc_context

    content = io.BytesIO()
    # Letters as outlines, no date and no random names, so that the same report gives the same bytes everywhere
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "hft_trl"}):
        figure.savefig(content, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    source = "data:image/svg+xml;base64," + b64encode(content.getvalue()).decode()
    width, height = (ceil(CSS_PIXELS * inches) for inches in figure.get_size_inches())
    narrow = figure.get_size_inches()[0] <= NARROW
    return Drawing(source, alt, width, height, int(0.8 * width) if narrow else width)
