"""`hft-trl continual`: commands for finished continual runs."""

import json
from typing import Annotated

import typer

from hft_trl.cli.shared import AsJson, quiet
from hft_trl.errors import exit_on_user_error
from hft_trl.files import resolved
from hft_trl.report.tables import rich_table

app = typer.Typer(
    help="Continual learning: finished runs of recipes/continual.py.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("compare")
@exit_on_user_error()
def compare_command(
    runs: Annotated[list[str], typer.Argument(help="Folders of continual runs on the same tasks.")],
    out: Annotated[
        str | None, typer.Option(help="Folder for comparison.md and comparison.png, by default that of the first run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare overall performance and backward transfer after the last round."""
    with quiet():
        from hft_trl.continual.report import compare, comparison_grid, other_settings, write_comparison

        found = compare(runs)
        written = write_comparison(found, out or resolved(runs[0]).parent) if out or not as_json else None
    if as_json:
        keys = ("approach", "method", "settings", "op", "bwt", "bwt_t_minus_1", "matrix")
        typer.echo(json.dumps({name: {key: run[key] for key in keys} for name, run in found.items()}, indent=2))
        return
    from rich.console import Console

    Console().print(rich_table(comparison_grid(found)))
    for line in other_settings(found):
        typer.echo(f"Not the same in all runs: {line}.")
    typer.echo(f"{written} has the table and the figure.")
