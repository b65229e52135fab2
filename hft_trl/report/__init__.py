"""Write and load a run's `report.json`, and make tables and plots from it."""

from pathlib import Path
from typing import TYPE_CHECKING

from hft_trl.environment import environment
from hft_trl.errors import HFTError
from hft_trl.files import write_text
from hft_trl.report.record import Report, StageRecord, UnitChange

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Report", "StageRecord", "UnitChange", "environment", "print_report", "write_views"]


def write_views(report: Report, directory: str | Path) -> list[Path]:
    """Write `report.md`, plots and `report.html` of a report from [`Report.load`]. Return their paths."""
    from hft_trl.report.plots import write_plots
    from hft_trl.report.views import PAGE_FILE, report_markdown, report_page

    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = write_plots(report, folder)
        text = folder / "report.md"
        write_text(text, report_markdown(report, [picture.name for picture in pictures]))
        page = folder / PAGE_FILE
        write_text(page, report_page(report))
    except OSError as error:
        raise HFTError(f"{folder} can't be written ({error.strerror}): choose another output folder.") from error
    return [text, page, *pictures]


def print_report(report: Report, console: "Console | None" = None) -> None:
    """Print the tables of a finished run, by default to standard output."""
    from rich.console import Console

    from hft_trl.report.tables import evaluation_grids, retention_grid, rich_table, stage_grid

    console = console or Console()
    retention = [retention_grid(report)] if report.retention else []
    for grid in (stage_grid(report), *evaluation_grids(report), *retention):
        console.print(rich_table(grid))
