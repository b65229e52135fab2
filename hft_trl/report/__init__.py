"""Write and load a run's `report.json`, and make tables and plots from it."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from hft_trl.environment import environment
from hft_trl.files import write_text, writing
from hft_trl.report.figures import save_figure
from hft_trl.report.plots import FIGURES
from hft_trl.report.record import Report, StageRecord, UnitChange
from hft_trl.report.tables import evaluation_grids, retention_grid, rich_table, stage_grid
from hft_trl.report.views import PAGE_FILE, report_markdown, report_page

__all__ = ["Report", "StageRecord", "UnitChange", "environment", "print_report", "write_views"]


def write_views(report: Report, directory: str | Path) -> list[Path]:
    """Write `report.md`, plots and `report.html` of a report from [`Report.load`]. Return their paths."""
    folder = Path(directory)
    inside = [replace(stage, start_model=stage.start_model.removeprefix(f"{folder}/")) for stage in report.stages]
    report = replace(report, stages=inside)
    figures = {name: draw(report) for name, draw in FIGURES.items()}
    written = [folder / "report.md", folder / PAGE_FILE, *(folder / name for name, drawn in figures.items() if drawn)]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            # Otherwise a plot of an earlier run would seem to belong to this one
            (folder / name).unlink(missing_ok=True)
            if figure is not None:
                save_figure(figure, folder / name)
        write_text(written[0], report_markdown(report, [path.name for path in written]))
        write_text(written[1], report_page(report))
    return written


def print_report(report: Report) -> None:
    """Print the tables of a finished run."""
    retention = [retention_grid(report.retention)] if report.retention else []
    for grid in (stage_grid(report), *evaluation_grids(report), *retention):
        Console().print(rich_table(grid))
