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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError, exit_on_user_error
from hft_trl.evaluation import options, parse_suites, print_evaluation, write_evaluation
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


def _setting(name: str, *flags: str) -> "OptionInfo":
    """The option for a field of [`HFTConfig`], with the help and the default that the field has."""
    field = HFTConfig.__dataclass_fields__[name]
    default = "none" if field.default is dataclasses.MISSING else str(field.default).lower()
    return typer.Option(*flags, help=f"{field.metadata['help']} [default: {default}]")


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
        str, typer.Argument(help="Hub id or folder of a causal language model; only its config is read.")
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
    given = {
        "ratio": ratio,
        "strategy": strategy,
        "seed": seed,
        "exclude": exclude or None,
        "reselect": reselect,
        "train_embeddings": train_embeddings,
        "train_lm_head": train_lm_head,
        "train_final_norm": train_final_norm,
    }
    given = {name: value for name, value in given.items() if value is not None}
    config = HFTConfig(**given)
    with _quiet():
        from hft_trl.checkpoints import selection_of
        from hft_trl.meta import build_on_meta

        skeleton = build_on_meta(model, revision, trust_remote_code)
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


@app.command("evaluate")
@exit_on_user_error()
def evaluate_command(
    models: options.Models,
    suite: options.Suite = "demo",
    base: options.Base = None,
    output: options.Output = Path("runs/evaluation"),
    limit: options.Limit = None,
    batch_size: options.BatchSize = 16,
    dtype: options.Dtype = "auto",
    chat_template: options.ChatTemplate = None,
    run_code: options.RunCode = False,
    cache: options.Cache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """
    Evaluate models with lm-evaluation-harness, side by side with their base.

    What was measured once comes from the cache. For several processes, launch recipes/evaluate.py.
    """
    suites = parse_suites(suite)
    with _quiet(logging.WARNING):  # the harness warns of prompts that don't fit, which it cuts
        from hft_trl.evaluation.models import find_models
        from hft_trl.evaluation.run import evaluate_models

        evaluation = evaluate_models(
            find_models(models, base),
            suites,
            chat_template=chat_template,
            dtype=dtype,
            batch_size=batch_size,
            limit=limit,
            run_code=run_code,
            cache=cache,
        )
        written = write_evaluation(evaluation, output)
    if as_json:
        typer.echo(json.dumps(evaluation.to_dict(), indent=2))
    else:
        print_evaluation(evaluation)
        typer.echo(f"Written: {', '.join(map(str, written))}")


@app.command("generate")
@exit_on_user_error()
def generate_command(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model, or demo for the embedded model.")],
    prompts: Annotated[Path, typer.Option(help="Local copy of AlpacaEval's alpaca_eval.json: what to ask.")],
    alpaca_eval: Annotated[
        bool, typer.Option("--alpaca-eval", help="Write the outputs file that alpaca_eval judges.")
    ] = False,
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("runs/alpaca_eval/outputs.json"),
    generator: Annotated[str | None, typer.Option(help="Name in the outputs; by default MODEL.")] = None,
    limit: options.Limit = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 2048,
    batch_size: options.BatchSize = 16,
    dtype: options.Dtype = "auto",
    chat_template: options.ChatTemplate = None,
) -> None:
    """
    Write a model's greedy replies to a file of prompts.

    The file is for the judge of the alpaca_eval project: alpaca_eval --model_outputs FILE.
    """
    if not alpaca_eval:
        raise HFTError("say in which format the replies are wanted: --alpaca-eval is the one there is.")
    with _quiet():
        from hft_trl.evaluation.alpaca import read_prompts, replies, write_outputs

        rows = read_prompts(prompts)[:limit]
        rows = replies(
            model,
            rows,
            generator or model,
            chat_template=chat_template,
            dtype=dtype,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )
        write_outputs(rows, output)
    typer.echo(f"Written: {output}, {len(rows)} replies")


@app.command("restore")
@exit_on_user_error()
def restore_command(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint of a run with hft.delta_checkpoints.")],
    output: Annotated[str, typer.Argument(help="Folder for the whole model.")],
    start_model: Annotated[
        str | None, typer.Option(help="The model that training started from, if it is somewhere else now.")
    ] = None,
) -> None:
    """Make a whole model of a delta checkpoint."""
    with _quiet():
        from hft_trl.delta import restore

        restore(checkpoint, output, start_model)
    typer.echo(output)


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
def _quiet(below: int = logging.ERROR) -> Iterator[None]:
    """Keep libraries from talking over the answer while a model is built: errors still come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(below - 1)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
