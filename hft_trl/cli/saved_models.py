"""`hft-trl half-reset` and `diff`: commands for the files of saved models."""

import json
from typing import Annotated, Literal

import typer

from hft_trl.cli.shared import AsJson, given, quiet, setting
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError, exit_on_user_error
from hft_trl.report.tables import rich_table

app = typer.Typer()

BASE = "The model that tuning started from: folder, cached hub id, demo or smollm2."


@app.command("half-reset")
@exit_on_user_error()
def half_reset_command(
    base: Annotated[str, typer.Option(help=BASE)],
    tuned: Annotated[str, typer.Option(help="The tuned model.")],
    out: Annotated[str, typer.Option(help="New folder for the result, which is written whole or not at all.")],
    ratio: Annotated[float | None, setting("ratio", "Share of the layers that stays tuned, in (0, 1].")] = None,
    strategy: Annotated[
        Literal["category", "layer", "model"] | None,
        setting("strategy", "Take the share of each category, of the layers, or of the whole model."),
    ] = None,
    seed: Annotated[int | None, setting("seed")] = None,
    exclude: Annotated[list[str] | None, setting("exclude", "Regular expressions on names: always reset.")] = None,
    train_embeddings: Annotated[bool | None, setting("train_embeddings", "Keep the input embedding tuned.")] = None,
    train_lm_head: Annotated[bool | None, setting("train_lm_head", "Keep the output head tuned.")] = None,
    train_final_norm: Annotated[bool | None, setting("train_final_norm", "Keep the last norm tuned.")] = None,
    blend: Annotated[
        float | None, typer.Option(help="Average all parameters instead: weight of the tuned model, in [0, 1].")
    ] = None,
) -> None:
    """
    Reset half of a tuned model's layers to its base, bit for bit, or average the two.

    Files are read and written tensor by tensor; no model is loaded.
    """
    settings = given(**locals())
    if blend is not None and settings:
        raise HFTError(f"--blend averages all parameters: drop --{next(iter(settings)).replace('_', '-')}.")
    config = HFTConfig(**settings)
    with quiet():
        from hft_trl.saved_models import half_reset

        if blend is not None:
            half_reset.blend(base, tuned, out, blend)
            text = f"{out}: {1 - blend:g} times {base} plus {blend:g} times {tuned}"
        else:
            selection, changed = half_reset.reset(base, tuned, out, config)
            stays, seed = selection.share, selection.config.seed
            text = f"{out}: {stays['layers']:.2%} of the layers stay {tuned}'s ({stays['model']:.2%} of the model)"
            text += f"; {changed:,} bytes changed"
            if seed != config.seed:
                text += f" (seed {seed}, since {tuned} was trained with the half of seed {config.seed})"
    typer.echo(text)


@app.command("diff")
@exit_on_user_error()
def diff_command(
    base: Annotated[str, typer.Argument(help=BASE)],
    tuned: Annotated[list[str], typer.Argument(help="One tuned model or more.")],
    plot: Annotated[str | None, typer.Option(help="Draw layers by modules into this file, such as diff.png.")] = None,
    as_json: AsJson = False,
) -> None:
    """
    Show what tuning changed, and check that the frozen half kept its bits.

    Exit code 1 says that a frozen half differs from the base.
    """
    with quiet():
        from hft_trl.saved_models import diff_view
        from hft_trl.saved_models.diff import compare

        if plot:
            diff_view.check_picture(plot)
        diffs = compare(base, tuned)
    if as_json:
        typer.echo(json.dumps(diff_view.diff_json(diffs), indent=2, allow_nan=False))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        for diff in diffs:
            console.print(rich_table(diff_view.layer_grid(diff)))
            console.print(rich_table(diff_view.category_grid(diff)))
            if diff.stage is not None:
                console.print(rich_table(diff_view.halves_grid(diff)))
        for diff in diffs:
            console.print(diff_view.verdict(diff), soft_wrap=True, markup=False)
    if plot:
        with quiet():
            diff_view.write_picture(diffs, plot)
    if any(diff.byte_identical is False for diff in diffs):
        raise typer.Exit(1)
