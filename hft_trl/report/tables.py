"""Build the tables of a report as plain cells, and format them for the terminal and Markdown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hft_trl.report.movement import category_movement
from hft_trl.report.record import HISTORY, Report, StageRecord
from hft_trl.selection.shares import CategoryShare

if TYPE_CHECKING:
    from rich.table import Table

NONE = "-"

MEASURES = {"text_loss": "loss on general text", "base_kl": "KL to the base", "facts": "facts (percent)"}
"""What `RetentionCallback` measures."""


@dataclass(frozen=True)
class Grid:
    """Store a table of formatted texts. `closing` has the numbers of summary rows."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    closing: frozenset[int] = frozenset()


def stage_grid(report: Report) -> Grid:
    """Return the measurements of the stages, a column for each stage."""
    rows = [
        ["method", *(stage.method for stage in report.stages)],
        ["trained share of the layers", *(percent(stage.share.get("layers")) for stage in report.stages)],
        ["trained share of the model", *(percent(stage.share.get("model")) for stage in report.stages)],
        ["trained parameters", *(count(stage.trainable_params) for stage in report.stages)],
        ["parameters", *(count(stage.total_params) for stage in report.stages)],
        ["steps", *(_steps(stage) for stage in report.stages)],
        ["tokens", *(count(stage.tokens) for stage in report.stages)],
        ["tokens per second", *(count(stage.tokens_per_second) for stage in report.stages)],
        ["time", *(duration(stage.runtime_seconds) for stage in report.stages)],
        ["peak memory", *(size(stage.peak_memory_bytes) for stage in report.stages)],
        ["optimizer state", *(size(stage.optimizer_state_bytes) for stage in report.stages)],
        ["loss, first to last", *(f"{loss(s.first_loss)} to {loss(s.last_loss)}" for s in report.stages)],
        ["frozen part unchanged", *(_unchanged(stage) for stage in report.stages)],
    ]
    if any(stage.reference_memory_bytes is not None for stage in report.stages):
        rows.insert(-2, ["reference, beside the policy", *(size(s.reference_memory_bytes) for s in report.stages)])
        rows.insert(
            -2, ["reference, shared with the policy", *(size(s.shared_reference_bytes) for s in report.stages)]
        )
    if any(stage.rows is not None for stage in report.stages):
        rows.append(["rows", *(count(stage.rows) for stage in report.stages)])
    if any(stage.dropped_rows for stage in report.stages):
        rows.append(["rows left out by truncation", *(count(stage.dropped_rows) for stage in report.stages)])
    return Grid("Stages", ["", *(stage.name for stage in report.stages)], rows)


def evaluation_grids(report: Report) -> list[Grid]:
    """Return the scores, a table for each suite, or one for all without suites."""
    grids = [evaluation_grid(report, measures) for measures in report.suites.values() or [None]]
    return [grid for grid in grids if grid.rows]


def evaluation_grid(report: Report, measures: Sequence[str] | None = None) -> Grid:
    """Return the scores with their differences from those of the first model."""
    measures = measures or list(dict.fromkeys(name for scores in report.evaluation.values() for name in scores))
    rows, first = [], None
    for model, scores in report.evaluation.items():
        first = scores if first is None else first
        errors = report.standard_errors.get(model, {})
        cells = [
            _score(scores.get(name), None if first is scores else first.get(name), errors.get(name))
            for name in measures
        ]
        rows.append([model, *cells])
    headings = [name.replace("_", " ") for name in measures]
    against = " ± standard error" if report.standard_errors else ""
    against += f", in brackets the difference to {next(iter(report.evaluation))}" if len(rows) > 1 else ""
    return Grid(f"Evaluation (percent{against})", ["model", *headings], rows)


def retention_grid(report: Report) -> Grid:
    """Return what the base and each stage keep, with the differences from the base."""
    models = {name: figures for name, figures in report.retention.items() if name != HISTORY}
    base = models.get("base", {})
    measures = [name for name in MEASURES if any(name in figures for figures in models.values())]
    rows = []
    for model, figures in models.items():
        cells = []
        for name in measures:
            value, before = figures.get(name), base.get(name) if model != "base" and name != "base_kl" else None
            cells.append(NONE if value is None else f"{value:.4g}")
            if value is not None and before is not None:
                cells[-1] += f" ({value - before:+.3g})"
        rows.append([model, *cells])
    return Grid("Retention (in brackets the difference to base)", ["model", *map(MEASURES.get, measures)], rows)


def category_grid(shares: Iterable[CategoryShare]) -> Grid:
    """Return the trained shares of a selection by category."""
    shares = list(shares)
    rows = [
        [row.category, count(row.units), count(row.parameters), count(row.trained), percent(row.share, 2)]
        for row in shares
    ]
    closing = frozenset(number for number, row in enumerate(shares) if row.category in ("layers", "model"))
    return Grid("What learns", ["category", "units", "parameters", "trained", "share"], rows, closing)


def share_grid(report: Report) -> Grid:
    """Return the shares of trained parameters by category, a column for each stage."""
    categories = list(dict.fromkeys(category for stage in report.stages for category in stage.share))
    rows = [[name, *(percent(stage.share.get(name)) for stage in report.stages)] for name in categories]
    closing = frozenset(number for number, name in enumerate(categories) if name in ("layers", "model"))
    return Grid("Trained share by category", ["category", *(stage.name for stage in report.stages)], rows, closing)


def movement_grids(report: Report) -> list[Grid]:
    """Return how far each category moved from the base model, a table for each stage."""
    columns = ["category", "units that learned", "their change", "frozen units", "their change"]
    grids = []
    for stage in report.stages:
        rows = [
            [row.category, count(row.learned_units), change(row.learned), count(row.frozen_units), change(row.frozen)]
            for row in category_movement(stage.moved)
        ]
        if rows:
            grids.append(Grid(f"Change from the base after {stage.name}", columns, rows))
    return grids


def rich_table(grid: Grid) -> "Table":
    """Format a table for the terminal."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    laid_out = Table(
        title=escape(grid.title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,  # five measures with their differences fit into 80 columns
    )
    for number, column in enumerate(grid.columns):
        laid_out.add_column(escape(column), justify="right" if number else "left", overflow="fold")
    for number, row in enumerate(grid.rows):
        laid_out.add_row(*map(escape, row), style="bold" if number in grid.closing else None)
    return laid_out


def table(grid: Grid) -> str:
    """Format a table in Markdown."""
    head = f"| {' | '.join(map(_cell, grid.columns))} |"
    rule = f"|:---|{'---:|' * (len(grid.columns) - 1)}"
    body = []
    for number, row in enumerate(grid.rows):
        bold = "**" if number in grid.closing else ""
        body.append(f"| {' | '.join(f'{bold}{_cell(text)}{bold}' for text in row)} |")
    return "\n".join([head, rule, *body])


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def count(value: float | None) -> str:
    """Format a number as an integer with separated thousands."""
    return NONE if value is None else f"{value:,.0f}"


def percent(value: float | None, digits: int = 1) -> str:
    """Format a share in [0, 1] as a percentage."""
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def size(value: float | None) -> str:
    """Format a number of bytes with a binary unit."""
    if value is None:
        return NONE
    power = min(4, max(0, int(value).bit_length() - 1) // 10)
    return f"{value / 1024**power:,.{2 if power else 0}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def duration(seconds: float | None) -> str:
    """Format seconds as seconds, minutes or hours."""
    if seconds is None:
        return NONE
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def loss(value: float | None) -> str:
    """Format a loss with four digits."""
    return NONE if value is None else f"{value:.4g}"


def change(value: float | None) -> str:
    """Format a relative change with three digits, an exact zero as 0."""
    return NONE if value is None else "0" if value == 0 else f"{value:.3g}"


def _steps(stage: StageRecord) -> str:
    resumed = "" if stage.resumed_from_step is None else f" (resumed from {count(stage.resumed_from_step)})"
    return count(stage.steps) + resumed


def _unchanged(stage: StageRecord) -> str:
    return {True: "yes, bit for bit", False: "NO", None: "nothing frozen"}[stage.frozen_unchanged]


def _score(value: Any, base: Any, stderr: Any) -> str:
    if value is None:
        return NONE
    error = "" if stderr is None else f"±{stderr:.1f}"
    return f"{value:.1f}{error}" if base is None else f"{value:.1f}{error} ({value - base:+.1f})"
