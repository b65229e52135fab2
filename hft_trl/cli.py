"""
The command line, `hft-trl`: each command parses, calls the library and prints.

Nothing heavy is imported before a command runs, so that `hft-trl --help` answers at once.
"""

import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hft_trl.config import HFTConfig
from hft_trl.demo import model_path
from hft_trl.errors import HFTError, exit_on_user_error
from hft_trl.report.machine import package_version
from hft_trl.report.picture import ASCII, SQUARES, layer_picture
from hft_trl.report.shares import category_shares
from hft_trl.report.tables import category_grid, rich_table
from hft_trl.selection import SELECTION_FILE, Selection, Unit, find_units, select

if TYPE_CHECKING:
    from typer.models import OptionInfo

app = typer.Typer(
    name="hft-trl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Framed help leaves long options and their texts a few characters each on a narrow terminal.
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of the console script."""
    app()


def _setting(name: str, text: str | None = None) -> "OptionInfo":
    """The option for a field of [`HFTConfig`], with the default and, unless the command says it otherwise, its help."""
    field = HFTConfig.__dataclass_fields__[name]
    default = "none" if field.default is dataclasses.MISSING else str(field.default).lower()
    return typer.Option(help=f"{text or field.metadata['help']} [default: {default}]")


def _given(**settings: Any) -> dict[str, Any]:
    """The settings that the user gave."""
    return {name: value for name, value in settings.items() if value not in (None, [])}


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
    ratio: Annotated[float | None, _setting("ratio")] = None,
    strategy: Annotated[Literal["category", "layer", "model"] | None, _setting("strategy")] = None,
    seed: Annotated[int | None, _setting("seed")] = None,
    exclude: Annotated[list[str] | None, _setting("exclude")] = None,
    reselect: Annotated[Literal["fresh", "same", "complement"] | None, _setting("reselect")] = None,
    train_embeddings: Annotated[bool | None, _setting("train_embeddings")] = None,
    train_lm_head: Annotated[bool | None, _setting("train_lm_head")] = None,
    train_final_norm: Annotated[bool | None, _setting("train_final_norm")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code from the model's repository run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """
    Show which half of a model learns.

    A model that was trained with HFT holds the half that it was trained with: without settings, that half is shown.
    With settings, or for another model, it is the half that the next stage would draw.
    """
    given = _given(
        ratio=ratio,
        strategy=strategy,
        seed=seed,
        exclude=exclude,
        reselect=reselect,
        train_embeddings=train_embeddings,
        train_lm_head=train_lm_head,
        train_final_norm=train_final_norm,
    )
    config = HFTConfig(**given)
    with _quiet():
        from hft_trl.checkpoints import selection_of
        from hft_trl.meta import build_on_meta

        skeleton = build_on_meta(model_path(model), revision, trust_remote_code)
        previous = selection_of(skeleton)
        stored = previous is not None and not given
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


@app.command("half-reset")
@exit_on_user_error()
def half_reset_command(
    base: Annotated[str, typer.Option(help="The model that tuning started from: folder, cached hub id, or demo.")],
    tuned: Annotated[str, typer.Option(help="The tuned model.")],
    out: Annotated[str, typer.Option(help="New folder for the result, which appears whole or not at all.")],
    ratio: Annotated[
        float | None, _setting("ratio", "Share of the layers' parameters that stays tuned, in (0, 1].")
    ] = None,
    strategy: Annotated[Literal["category", "layer", "model"] | None, _setting("strategy")] = None,
    seed: Annotated[int | None, _setting("seed")] = None,
    exclude: Annotated[
        list[str] | None, _setting("exclude", "Regular expressions on parameter names: always set back.")
    ] = None,
    train_embeddings: Annotated[
        bool | None, _setting("train_embeddings", "Whether the input embedding stays tuned.")
    ] = None,
    train_lm_head: Annotated[bool | None, _setting("train_lm_head", "Whether the output head stays tuned.")] = None,
    train_final_norm: Annotated[
        bool | None, _setting("train_final_norm", "Whether the norm after the last layer stays tuned.")
    ] = None,
    blend: Annotated[
        float | None,
        typer.Option(help="Average all parameters instead: the tuned model's part, in [0, 1].", show_default=False),
    ] = None,
) -> None:
    """
    Set half of a tuned model's layers back to its base, bit for bit, or average the two.

    Files are read and written tensor by tensor; no model is loaded.
    """
    given = _given(
        ratio=ratio,
        strategy=strategy,
        seed=seed,
        exclude=exclude,
        train_embeddings=train_embeddings,
        train_lm_head=train_lm_head,
        train_final_norm=train_final_norm,
    )
    if blend is not None and given:
        raise HFTError(f"--blend averages all parameters: drop --{next(iter(given)).replace('_', '-')}.")
    config = HFTConfig(**given)
    with _quiet():
        from hft_trl import reset

        if blend is not None:
            reset.blend(base, tuned, out, blend)
            text = f"{out}: {1 - blend:g} times {base} plus {blend:g} times {tuned}"
        else:
            stays = reset.half_reset(base, tuned, out, config).share
            text = f"{out}: {stays['layers']:.2%} of the layers stay {tuned}'s ({stays['model']:.2%} of the model)"
    typer.echo(text)


@app.command("diff")
@exit_on_user_error()
def diff_command(
    base: Annotated[str, typer.Argument(help="The model that tuning started from: folder, cached hub id, or demo.")],
    tuned: Annotated[list[str], typer.Argument(help="One tuned model or more.")],
    plot: Annotated[str | None, typer.Option(help="Draw layers by modules into this file, such as diff.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """
    Show what tuning changed, and check that the frozen half kept its bits.

    Exit code 1 says that a frozen half is not the base's.
    """
    with _quiet():
        from hft_trl.diff import compare
        from hft_trl.report.diff import category_grid, diff_json, layer_grid, verdict, write_picture

        diffs = compare(base, tuned)
        if plot:
            write_picture(diffs, plot)
    if as_json:
        typer.echo(json.dumps(diff_json(diffs), indent=2, allow_nan=False))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        for diff in diffs:
            console.print(rich_table(layer_grid(diff)))
            console.print(rich_table(category_grid(diff)))
        for diff in diffs:
            console.print(verdict(diff), soft_wrap=True, markup=False)
    if any(diff.byte_identical is False for diff in diffs):
        raise typer.Exit(1)


def _as_json(model: str, stored: bool, selection: Selection, units: list[Unit]) -> dict[str, Any]:
    return {
        "model": model,
        "stored": stored,
        "config": selection.config.selecting(),
        "seed": selection.seed,
        "share": selection.share,
        "digest": selection.digest,
        "categories": [
            {**dataclasses.asdict(row), "share": row.share} for row in category_shares(units, selection.trainable)
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
    console.print(rich_table(category_grid(category_shares(units, selection.trainable))))
    console.print(picture, soft_wrap=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries from talking over the answer while a model is built: errors still come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
