"""The command line `hft-trl`. Heavy imports wait until a command runs, which keeps `--help` fast."""

import dataclasses
import json
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from hft_trl.cli import evaluate, launch, plan, saved_models
from hft_trl.cli.shared import AsJson, Revision, TrustRemoteCode, given, quiet, setting
from hft_trl.config import HFTConfig, Importance, Strategy
from hft_trl.demo import model_path
from hft_trl.environment import package_version
from hft_trl.errors import exit_on_user_error

app = typer.Typer(
    name="hft-trl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the frames of rich's help leave little room for long options on a narrow terminal
)
app.add_typer(evaluate.app)
app.add_typer(saved_models.app)
app.add_typer(plan.app)
app.add_typer(evaluate.continual_app, name="continual")
app.add_typer(launch.app)
app.add_typer(launch.recipe_app, name="recipe")
main = app  # entry point of the console script


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
        str, typer.Argument(help="Hub id or folder of a causal LM, demo or smollm2; importance reads its weights.")
    ],
    ratio: Annotated[float | None, setting("ratio")] = None,
    strategy: Annotated[Strategy | None, setting("strategy")] = None,
    importance: Annotated[Importance | None, setting("importance")] = None,
    importance_order: Annotated[Literal["most", "least"] | None, setting("importance_order")] = None,
    seed: Annotated[int | None, setting("seed")] = None,
    exclude: Annotated[list[str] | None, setting("exclude")] = None,
    reselect: Annotated[Literal["fresh", "same", "complement"] | None, setting("reselect")] = None,
    train_embeddings: Annotated[bool | None, setting("train_embeddings")] = None,
    train_lm_head: Annotated[bool | None, setting("train_lm_head")] = None,
    train_final_norm: Annotated[bool | None, setting("train_final_norm")] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """
    Show which half of a model learns.

    Without settings, this is the half that the model was trained with, if it was trained with HFT. With settings, or
    for another model, it is the half that the next stage would draw.
    """
    settings = given(**locals())
    config = HFTConfig(**settings)
    with quiet():
        from hft_trl.report.layer_map import ASCII, SQUARES, layer_picture
        from hft_trl.report.tables import category_grid, rich_table
        from hft_trl.selection import SELECTION_FILE, find_units, select
        from hft_trl.selection.previous import selection_of
        from hft_trl.selection.shares import category_shares
        from hft_trl.skeleton import build_on_meta, load, shape_of

        path = model_path(model) if revision else shape_of(model)
        by_weights = config.strategy == "importance" and not config.calibrated
        skeleton = (load if by_weights else build_on_meta)(path, revision, trust_remote_code)
        previous = selection_of(skeleton, revision)
        stored = previous is not None and not settings
        selection = previous if stored else select(skeleton, config, previous)
        selection.apply(skeleton)  # rejects the stored selection of another model
        units = find_units(skeleton, selection.config.exclude)
        shares = category_shares(units, selection.trainable, selection.masked)
    if as_json:
        content = {
            "model": model,
            "stored": stored,
            "config": selection.config.selecting(),
            "seed": selection.seed,
            "share": selection.share,
            "digest": selection.digest,
            "categories": [{**dataclasses.asdict(row), "share": row.share} for row in shares],
            "trainable": list(selection.trainable),
            "frozen": list(selection.frozen),
        }
        typer.echo(json.dumps(content, indent=2))
        return
    if stored:
        heading = f"{model} was trained with this half ({SELECTION_FILE})"
    elif previous is not None:
        heading = f"What the next stage from {model} would train, {selection.config.reselect} selection"
    else:
        heading = f"What a first stage from {model} would train"
    console = Console(highlight=False)
    marks = ASCII if console.options.ascii_only else SQUARES
    trainable = set(selection.trainable)
    picture = Text(layer_picture(units, lambda unit: unit.names[0] in trainable, console.width, marks))
    picture.highlight_regex(f"{marks[0]}(?= |$)", "green")
    config = selection.config
    drawn = f"ratio {config.ratio:g}, strategy {config.strategy}" if config.method == "hft" else "all learns (FFT)"
    console.print(Text(heading, "bold"), soft_wrap=True)
    console.print(Text(f"{drawn}, seed {selection.seed}, digest {selection.digest[:16]}\n"), soft_wrap=True)
    console.print(rich_table(category_grid(shares)))
    console.print(picture, soft_wrap=True)
    if selection.masks is not None:
        text = f"In the layers {marks[0]} is a matrix with {selection.share['layers']:.2%} of its elements learning."
        console.print(text, soft_wrap=True)
