"""Build the tables of a report as plain cells, and format them for the terminal and Markdown."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hft_trl.demo import MEANINGS
from hft_trl.report.record import HISTORY, Report, StageRecord
from hft_trl.selection.shares import CategoryShare

NONE = "-"
UNCHANGED = {True: "yes, bit for bit", False: "NO", None: "nothing frozen"}

MEASURES = {"text_loss": "loss on general text", "base_kl": "KL to the base (nats)", "facts": "facts (percent)"}
"""What `RetentionCallback` measures."""


@dataclass(frozen=True)
class Grid:
    """Store a table of formatted texts. `closing` counts summary rows, `prose` means long texts."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    closing: frozenset[int] = frozenset()
    note: str = ""
    prose: bool = False


def stage_grid(report: Report) -> Grid:
    """Return the measurements of the stages, a column for each stage, without rows that no stage has."""
    cells: dict[str, Callable[[StageRecord], str]] = {
        "method": lambda stage: stage.method,
        "trained share of the layers": lambda stage: percent(stage.share.get("layers")),
        "trained share of the model": lambda stage: percent(stage.share.get("model")),
        "trained parameters": lambda stage: count(stage.trainable_params),
        "parameters": lambda stage: count(stage.total_params),
        "rows": lambda stage: count(stage.rows),
        "rows left out by truncation": lambda stage: count(stage.dropped_rows or None),
        "rows in a batch": lambda stage: count(stage.batch_size),
        "steps": _steps,
        "step of the saved model": lambda stage: count(stage.best_step),
        "epochs": lambda stage: NONE if (epochs := _last(stage, "epoch")) is None else f"{epochs:.2f}",
        "learning rate": lambda stage: NONE if stage.learning_rate is None else f"{stage.learning_rate:g}",
        "tokens": lambda stage: count(stage.tokens),
        "tokens per second": lambda stage: count(stage.tokens_per_second),
        "time": lambda stage: duration(stage.runtime_seconds),
        "peak memory": lambda stage: size(stage.peak_memory_bytes),
        "optimizer state": lambda stage: size(stage.optimizer_state_bytes),
        "reference, beside the policy": lambda stage: size(stage.reference_memory_bytes),
        "reference, shared with the policy": lambda stage: size(stage.shared_reference_bytes),
        "loss, first to last": _losses,
        "evaluation loss": lambda stage: loss(_last(stage, "eval_loss", stage.best_step)),
        "frozen part unchanged": lambda stage: UNCHANGED[stage.frozen_unchanged],
    }
    rows = [[name, *map(cell, report.stages)] for name, cell in cells.items()]
    rows = [row for row in rows if {*row[1:]} != {NONE}]
    return Grid("Stages", ["", *(stage.name for stage in report.stages)], rows)


def evaluation_grids(report: Report) -> list[Grid]:
    """Return the scores and their differences from the first model, a table for each suite."""
    grids, models = [], report.evaluation
    if not models:
        return grids
    base = next(iter(models))
    against = " ± standard error" if report.standard_errors else ""
    against += f", in brackets the difference to {base}" if len(models) > 1 else ""
    every = list(dict.fromkeys(name for scores in models.values() for name in scores))
    for measures in report.suites.values() or [every]:
        rows = []
        for model, scores in models.items():
            errors, before = report.standard_errors.get(model, {}), {} if model == base else models[base]
            rows.append([model, *(_score(scores.get(name), before.get(name), errors.get(name)) for name in measures)])
        headings = [name.replace("_", " ") for name in measures]
        grids.append(Grid(f"Evaluation (percent{against})", ["model", *headings], rows, note=meaning(measures)))
    return grids


def meaning(measures: Iterable[str]) -> str:
    """Explain those measures that are the embedded world's."""
    return "; ".join(f"{name}: {MEANINGS[name]}" for name in measures if name in MEANINGS)


def sample_grid(report: Report) -> Grid:
    """Return the sample answers, a row for each prompt and a column for each model."""
    columns = list(report.samples[0])
    rows = [[sample[name] or "(empty)" for name in columns] for sample in report.samples]
    return Grid("Sample answers", columns, rows, prose=True)


def retention_grid(retention: Mapping[str, Any]) -> Grid:
    """Return what the base and each stage keep, with the differences from the base, from [`retention_of`]."""
    models = {name: figures for name, figures in retention.items() if name != HISTORY}
    base = models.get("base", {})
    measures = [name for name in MEASURES if any(name in figures for figures in models.values())]
    rows = []
    for model, figures in models.items():
        before = {} if model == "base" else {**base, "base_kl": None}
        cells = (_score(figures.get(name), before.get(name), digits=1 if name == "facts" else 4) for name in measures)
        rows.append([model, *cells])
    return Grid("Retention (in brackets the difference to base)", ["model", *map(MEASURES.get, measures)], rows)


def category_grid(shares: Iterable[CategoryShare]) -> Grid:
    """Return the trained shares of a selection by category."""
    shares = list(shares)
    rows = [[s.category, count(s.units), count(s.parameters), count(s.trained), percent(s.share, 2)] for s in shares]
    closing = frozenset(number for number, row in enumerate(shares) if row.category in ("layers", "model"))
    return Grid("What learns", ["category", "units", "parameters", "trained", "share"], rows, closing)


def share_grid(report: Report) -> Grid:
    """Return the shares of trained parameters by category, a column for each stage."""
    categories = list(dict.fromkeys(category for stage in report.stages for category in stage.share))
    rows = [[name, *(percent(stage.share.get(name)) for stage in report.stages)] for name in categories]
    closing = frozenset(number for number, name in enumerate(categories) if name in ("layers", "model"))
    return Grid("Trained share by category", ["category", *(stage.name for stage in report.stages)], rows, closing)


def rich_table(grid: Grid) -> Table:
    """Format a table for the terminal, turned where its headings would not fit without breaking words."""
    width = Console().width
    turned = [list(row) for row in zip(grid.columns, *grid.rows, strict=True)]
    if _least(grid.columns) > width >= _least(turned[0]):
        grid = Grid(grid.title, turned[0], turned[1:], note=grid.note)
    laid_out = Table(
        title=escape(grid.title),
        title_justify="left",
        title_style="bold",
        caption=escape(grid.note) or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,  # five measures with their differences fit into 80 columns
    )
    for number, column in enumerate(grid.columns):
        least = _least([column]) - 3 if _least(grid.columns) <= width else None
        laid_out.add_column(escape(column), justify="right" if number else "left", overflow="fold", min_width=least)
    for number, row in enumerate(grid.rows):
        laid_out.add_row(*map(escape, row), style="bold" if number in grid.closing else None)
    return laid_out


def _least(columns: Iterable[str]) -> int:
    """Return the width of a table in which only the longest word of each heading fits."""
    return sum(3 + max(map(len, column.split()), default=0) for column in columns)


def table(grid: Grid) -> str:
    """Format a table in Markdown."""
    head = f"| {' | '.join(map(_cell, grid.columns))} |"
    rule = f"|:---|{(':---|' if grid.prose else '---:|') * (len(grid.columns) - 1)}"
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
    """Format a loss with four decimals."""
    return NONE if value is None else f"{value:.4f}"


def change(value: float | None) -> str:
    """Format a relative change in percent with three decimals, an exact zero as 0."""
    if not value:
        return NONE if value is None else "0"
    return f"{100 * value:.3f} %" if value >= 5e-6 else "< 0.001 %"


def _last(stage: StageRecord, key: str, step: int | None = None) -> Any:
    rows = [row for row in stage.history if row.get(key) is not None and step in (None, row.get("step"))]
    return rows[-1][key] if rows else None


def _losses(stage: StageRecord) -> str:
    rows = sum("loss" in row for row in stage.history)
    return loss(stage.last_loss) if rows == 1 else f"{loss(stage.first_loss)} to {loss(stage.last_loss)}"


def _steps(stage: StageRecord) -> str:
    resumed = "" if stage.resumed_from_step is None else f" (resumed from {count(stage.resumed_from_step)})"
    return count(stage.steps) + resumed


def _score(value: float | None, base: float | None, stderr: float | None = None, digits: int = 1) -> str:
    if value is None:
        return NONE
    error = "" if stderr is None else f"±{stderr:.{digits}f}"
    against = "" if base is None else f" ({value - base:+.{digits}f})"
    return f"{value:.{digits}f}{error}{against}"
