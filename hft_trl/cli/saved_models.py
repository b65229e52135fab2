"""`hft-trl half-reset`, `repair` and `diff`: commands for the files of saved models."""

import json
from typing import Annotated

import typer
from rich.console import Console

from hft_trl.cli.shared import AsJson, OfMatrices, given, quiet, setting
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError, exit_on_user_error

app = typer.Typer()

BASE = "The model that tuning started from: folder, cached hub id, demo or smollm2."


@app.command("half-reset")
@exit_on_user_error()
def half_reset_command(
    base: Annotated[str, typer.Option(help=BASE)],
    tuned: Annotated[str, typer.Option(help="The tuned model.")],
    out: Annotated[
        str, typer.Option(help="New or empty folder for the result, which is written completely or not at all.")
    ],
    ratio: Annotated[float | None, setting("ratio", "Share of the layers that stays tuned, in (0, 1].")] = None,
    strategy: Annotated[OfMatrices | None, setting("strategy", "How the tuned half is chosen.")] = None,
    seed: Annotated[int | None, setting("seed")] = None,
    exclude: Annotated[list[str] | None, setting("exclude", "Regular expressions on names: always reset.")] = None,
    train_embeddings: Annotated[bool | None, setting("train_embeddings", "Keep the input embedding tuned.")] = None,
    train_lm_head: Annotated[bool | None, setting("train_lm_head", "Keep the output head tuned.")] = None,
    train_final_norm: Annotated[bool | None, setting("train_final_norm", "Keep the last norm tuned.")] = None,
) -> None:
    """
    Reset half of a tuned model's layers to its base, bit for bit.

    Files are read and written tensor by tensor; no model is loaded.
    """
    config = HFTConfig(**given(**locals()))
    with quiet():
        from hft_trl.saved_models.half_reset import reset

        selection, changed = reset(base, tuned, out, config)
    stays, seed = selection.share, selection.config.seed
    text = f"{out}: {stays['layers']:.2%} of the layers stay {tuned}'s ({stays['model']:.2%} of the model)"
    text += f"; {changed:,} bytes changed"
    if seed != config.seed:
        text += f" (seed {seed}, since {tuned} was trained with the half of seed {config.seed})"
    typer.echo(text)


@app.command("repair")
@exit_on_user_error()
def repair_command(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help=BASE)],
    tuned: Annotated[str, typer.Argument(help="The tuned model.")],
    out: Annotated[
        str, typer.Option(help="New or empty folder for the result, which is written completely or not at all.")
    ],
    texts: Annotated[str | None, typer.Option(help="General text: a text file, or .jsonl rows with a text.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Rows of the task: a file or data set with messages, prompt and completion.")
    ] = None,
    facts: Annotated[
        str | None, typer.Option(help="Facts for the report: .jsonl rows with text, answer and others.")
    ] = None,
    weights: Annotated[
        list[float] | None,
        typer.Option(help="Weight of TUNED in an average, in [0, 1]; repeat the flag for more. [default: 0.1 to 0.9]"),
    ] = None,
    ratio: Annotated[float | None, setting("ratio", "Share of the layers that stays tuned in the Half-Reset.")] = None,
    seed: Annotated[int | None, setting("seed")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, max=100, help="Share by which the task loss may be above that of TUNED.")
    ] = 0.02,
    max_rows: Annotated[int, typer.Option(min=1, help="Largest number of texts, facts and rows of the task.")] = 128,
    weight: Annotated[
        float | None, typer.Option(help="Write the average with this weight of TUNED, without measuring.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Mix a tuned model with its base, without training, so that it forgets less.

    Chosen is the least loss on --texts among the models whose loss on --task is at most --tolerance above TUNED's.
    With the base demo, texts and task are by default the embedded world's.
    """
    config = HFTConfig(**given(ratio=ratio, seed=seed))
    if weight is not None:
        # Only what the user gave counts: defaults have values too
        options = {each.name: each.opts[0] for each in context.command.params if each.opts[0].startswith("--")}
        by_user = [name for name in options if context.get_parameter_source(name).name == "COMMANDLINE"]
        if unused := [options[name] for name in by_user if name not in ("out", "weight")]:
            raise HFTError(f"--weight {weight:g} measures nothing: drop {' and '.join(unused)}.")
        with quiet():
            from hft_trl.saved_models.half_reset import average

            average(base, tuned, out, weight)
        typer.echo(f"{out}: {1 - weight:g} times {base} plus {weight:g} times {tuned}")
        return
    with quiet():
        from hft_trl.experiments.repair import WEIGHTS, repair
        from hft_trl.report.tables import MEASURES, Grid, loss, rich_table

        rows = {"texts": texts, "task": task, "facts": facts, "max_rows": max_rows}
        tried = {"weights": weights or WEIGHTS, "tolerance": tolerance}
        record = repair(base, tuned, out, config, **rows, **tried)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    measures = {"task_loss": "task loss", **MEASURES}
    shown = [name for name in measures if name in record["candidates"][0]]
    marks = {record["chosen"]: "yes"}
    found = record["candidates"]
    cells = [[each["name"], *(loss(each[name]) for name in shown), marks.get(each["name"], "")] for each in found]
    grid = Grid(f"{tuned} mixed with {base}", ["model", *map(measures.get, shown), "chosen"], cells)
    Console(highlight=False).print(rich_table(grid))
    why = f"the lowest loss on general text with a task loss at most {tolerance:.1%} above that of {tuned}"
    typer.echo(f"{out}: {record['chosen']}, {why}")


@app.command("diff")
@exit_on_user_error()
def diff_command(
    base: Annotated[str, typer.Argument(help=BASE)],
    tuned: Annotated[list[str], typer.Argument(help="One tuned model or more.")],
    plot: Annotated[
        str | None, typer.Option(help="Write a heat map of layers by modules to this file, such as diff.png.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Show what tuning changed, and check that the frozen half kept its bits.

    The exit code is 1 if a frozen half differs from the base.
    """
    with quiet():
        from hft_trl.report.tables import rich_table
        from hft_trl.saved_models import diff_view
        from hft_trl.saved_models.diff import compare

        if plot is not None:
            diff_view.check_picture(plot)
        diffs = compare(base, tuned)
    if as_json:
        typer.echo(json.dumps(diff_view.diff_json(diffs), indent=2, allow_nan=False))
    else:
        console = Console(highlight=False)
        for diff in diffs:
            console.print(rich_table(diff_view.layer_grid(diff)))
            console.print(rich_table(diff_view.category_grid(diff)))
            if diff.stage is not None:
                console.print(rich_table(diff_view.halves_grid(diff)))
        for diff in diffs:
            console.print(diff_view.verdict(diff), soft_wrap=True, markup=False)
    if plot is not None:
        with quiet():
            diff_view.write_picture(diffs, plot)
    if any(diff.byte_identical is False for diff in diffs):
        raise typer.Exit(1)
