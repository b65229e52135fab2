"""
The command line, `hft-trl`: each command parses, calls the library and prints.

Nothing heavy is imported before a command runs, so that `hft-trl --help` answers at once.
"""

import dataclasses
import json
from typing import Annotated, Any, Literal

import typer

from hft_trl.cli import continual, evaluate, plan, saved_models
from hft_trl.cli.shared import Revision, TrustRemoteCode, given, quiet, setting
from hft_trl.config import HFTConfig
from hft_trl.demo import model_path
from hft_trl.environment import package_version
from hft_trl.errors import exit_on_user_error
from hft_trl.report.layer_map import ASCII, SQUARES, layer_picture
from hft_trl.report.shares import category_shares
from hft_trl.report.tables import category_grid, rich_table
from hft_trl.selection import SELECTION_FILE, Selection, Unit, find_units, select

app = typer.Typer(
    name="hft-trl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Framed help leaves long options and their texts a few characters each on a narrow terminal.
    rich_markup_mode=None,
)
app.add_typer(evaluate.app)
app.add_typer(saved_models.app)
app.add_typer(plan.app)
app.add_typer(continual.app, name="continual")


def main() -> None:
    """Entry point of the console script."""
    app()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(package_version("hft_trl"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Half Fine-Tuning for TRL: train a random half of every layer, keep the other half bit for bit."""


@app.command("select")
@exit_on_user_error()
def select_command(
    model: Annotated[
        str, typer.Argument(help="Hub id or folder of a causal language model, or demo; only its config is read.")
    ],
    ratio: Annotated[float | None, setting("ratio")] = None,
    strategy: Annotated[
        Literal["category", "layer", "model", "importance", "element"] | None, setting("strategy")
    ] = None,
    seed: Annotated[int | None, setting("seed")] = None,
    exclude: Annotated[list[str] | None, setting("exclude")] = None,
    reselect: Annotated[Literal["fresh", "same", "complement"] | None, setting("reselect")] = None,
    train_embeddings: Annotated[bool | None, setting("train_embeddings")] = None,
    train_lm_head: Annotated[bool | None, setting("train_lm_head")] = None,
    train_final_norm: Annotated[bool | None, setting("train_final_norm")] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """
    Show which half of a model learns.

    A model that was trained with HFT holds the half that it was trained with: without settings, that half is shown.
    With settings, or for another model, it is the half that the next stage would draw.
    """
    settings = given(
        ratio=ratio,
        strategy=strategy,
        seed=seed,
        exclude=exclude,
        reselect=reselect,
        train_embeddings=train_embeddings,
        train_lm_head=train_lm_head,
        train_final_norm=train_final_norm,
    )
    config = HFTConfig(**settings)
    with quiet():
        from hft_trl.checkpoints.whole import selection_of
        from hft_trl.planning.shapes import shape_of
        from hft_trl.skeleton import build_on_meta

        skeleton = build_on_meta(model_path(model) if revision else shape_of(model), revision, trust_remote_code)
        previous = selection_of(skeleton)
        stored = previous is not None and not settings
        selection = previous if stored else select(skeleton, config, previous)
        # A selection that some other model was trained with names parameters that this one lacks.
        selection.apply(skeleton)
        units = find_units(skeleton, selection.config.exclude)
    if as_json:
        typer.echo(json.dumps(_as_json(model, stored, selection, units), indent=2))
    elif stored:
        _show(f"{model} was trained with this half ({SELECTION_FILE})", selection, units)
    elif previous is not None:
        _show(f"What the next stage from {model} would train, {selection.config.reselect} selection", selection, units)
    else:
        _show(f"What a first stage from {model} would train", selection, units)


def _as_json(model: str, stored: bool, selection: Selection, units: list[Unit]) -> dict[str, Any]:
    return {
        "model": model,
        "stored": stored,
        "config": selection.config.selecting(),
        "seed": selection.seed,
        "share": selection.share,
        "digest": selection.digest,
        "categories": [
            {**dataclasses.asdict(row), "share": row.share}
            for row in category_shares(units, selection.trainable, selection.masked)
        ],
        "trainable": list(selection.trainable),
        "frozen": list(selection.frozen),
    }


def _show(heading: str, selection: Selection, units: list[Unit]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    marks = ASCII if console.options.ascii_only else SQUARES
    picture = Text(layer_picture(units, selection.trainable, console.width, marks))
    picture.highlight_regex(f"{marks[0]}(?= |$)", "green")
    settings = selection.config
    drawn = (
        f"ratio {settings.ratio:g}, strategy {settings.strategy}" if settings.method == "hft" else "all learns (FFT)"
    )
    for line in (Text(heading, "bold"), Text(f"{drawn}, seed {selection.seed}, digest {selection.digest[:16]}\n")):
        console.print(line, soft_wrap=True)
    console.print(rich_table(category_grid(category_shares(units, selection.trainable, selection.masked))))
    console.print(picture, soft_wrap=True)
    if selection.masks is not None:
        share = selection.share["layers"]
        console.print(
            f"In the layers {marks[0]} is a matrix of which {share:.2%} of the elements learn.", soft_wrap=True
        )
