"""`hft-trl evaluate`, `generate` and `continual`."""

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hft_trl.cli.shared import AsJson, quiet
from hft_trl.errors import HFTError, exit_on_user_error, speaks
from hft_trl.files import check_output, read_texts, resolved, write_json, writing

app = typer.Typer()
continual_app = typer.Typer(
    help="Continual learning: finished runs of recipes/continual.py.", no_args_is_help=True, rich_markup_mode=None
)

OUTPUTS = Path("runs/alpaca_eval/outputs.json")
BatchSize = Annotated[int, typer.Option(min=1, help="Batch size of each process.")]
ChatTemplate = Annotated[
    str | None, typer.Option(help="tulu or a .jinja file; by default the tokenizer's own, Tülu's if it has none.")
]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(help="Type in which the weights are loaded; auto is the file's."),
]


@app.command("evaluate")
@exit_on_user_error()
def evaluate_command(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Folder, hub id (id@revision), demo or smollm2.")
    ],
    suite: Annotated[str, typer.Option(help="general, knowledge or demo; several with commas.")] = "demo",
    base: Annotated[str | None, typer.Option(help="Model to compare with; by default the first MODEL.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for evaluation.json, .md and .png.")] = Path("runs/evaluation"),
    limit: Annotated[int | None, typer.Option(min=1, help="Items per (sub)task at most; by default all.")] = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    chat_template: ChatTemplate = None,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Run code that a model wrote (HumanEval), with the rights of this user.")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Cache folder; by default ~/.cache/hft_trl/evaluation.")] = None,
    backend: Annotated[
        Literal["hf", "vllm"], typer.Option(help="Backend of the harness; vllm is faster on GPUs.")
    ] = "hf",
    as_json: AsJson = False,
) -> None:
    """
    Evaluate models with lm-evaluation-harness, side by side with their base.

    Finished tasks are read from the cache. For several processes, launch recipes/evaluate.py.
    """
    with quiet(logging.WARNING):  # the harness warns of prompts that it truncates
        from hft_trl.evaluation import parse_suites, print_evaluation, write_evaluation
        from hft_trl.evaluation.run import evaluate_models, find_models

        suites = parse_suites(suite)
        if speaks():
            check_output("--output", output)
        options = {"chat_template": chat_template, "dtype": dtype, "batch_size": batch_size, "limit": limit}
        options |= {"run_code": run_code, "cache": cache, "backend": backend}
        evaluation = evaluate_models(find_models(models, base), suites, **options)
        if not speaks():
            return
        written = write_evaluation(evaluation, output)
    if as_json:
        typer.echo(json.dumps(evaluation.to_dict(), indent=2))
    else:
        print_evaluation(evaluation)
        typer.echo(f"Written: {', '.join(map(str, written))}")


@app.command("generate")
@exit_on_user_error()
def generate_command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Folder, hub id, demo or smollm2.")],
    prompts: Annotated[
        list[str], typer.Option(help="Question; repeat the flag for more. With --alpaca-eval, one file of prompts.")
    ],
    alpaca_eval: Annotated[
        bool, typer.Option("--alpaca-eval", help="Write the answers to a file in alpaca_eval's format.")
    ] = False,
    output: Annotated[Path, typer.Option(help="File that --alpaca-eval writes.")] = OUTPUTS,
    generator: Annotated[
        str | None, typer.Option(help="Name of MODEL in the --alpaca-eval file; by default MODEL.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Prompts of the --alpaca-eval file at most; by default all.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per answer at most. [default: 256, with --alpaca-eval 2048]")
    ] = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    chat_template: ChatTemplate = None,
    as_json: AsJson = False,
) -> None:
    """
    Ask models something: their greedy answers to --prompts, side by side.

    --alpaca-eval writes the answers of one model to a file for that project's judge: alpaca_eval --model_outputs FILE.
    """
    if alpaca_eval and len(models) + len(prompts) > 2:
        raise HFTError("--alpaca-eval takes one model and one file of prompts.")
    if not alpaca_eval and (files := [prompt for prompt in prompts if os.path.exists(prompt)]):  # noqa: PTH110
        raise HFTError(f"--prompts is the file {files[0]!r}: add --alpaca-eval, or give a question.")
    if not alpaca_eval and (generator or limit):
        raise HFTError("--generator and --limit are about the file that --alpaca-eval writes: add it, or remove them.")
    if alpaca_eval:
        rows = read_texts(Path(prompts[0]), "instruction")[:limit]
        check_output("--output", output, is_file=True)
        prompts = [row["instruction"] for row in rows]
    length = max_new_tokens or (2048 if alpaca_eval else 256)
    with quiet():
        from hft_trl.evaluation.run import sample_answers

        options = {"chat_template": chat_template, "dtype": dtype, "batch_size": batch_size, "progress": alpaca_eval}
        answers = {model: sample_answers(model, prompts, length, **options) for model in models}
    if alpaca_eval:
        added = [{"output": reply, "generator": generator or models[0]} for reply in answers[models[0]]]
        with writing(output, resumes=False):
            content = [{"dataset": "", **row, **new} for row, new in zip(rows, added, strict=True)]
            write_json(output, content, ensure_ascii=False)
        typer.echo(f"Written: {output}, {len(rows)} replies")
        return
    if as_json:
        typer.echo(json.dumps({"prompts": prompts, "answers": answers}, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    for number, prompt in enumerate(prompts):
        table = Table.grid(padding=(0, 2))
        for model, texts in answers.items():
            table.add_row(Text(model), Text(texts[number]))
        console.print(Text(prompt, "bold"))
        console.print(table)


@continual_app.command("compare")
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
        from hft_trl.report.tables import rich_table

        found = compare(runs)
        written = write_comparison(found, out or resolved(runs[0]).parent) if out or not as_json else None
    if as_json:
        keys = ("approach", "method", "settings", "op", "bwt", "bwt_t_minus_1", "matrix")
        typer.echo(json.dumps({name: {key: run[key] for key in keys} for name, run in found.items()}, indent=2))
        return
    Console().print(rich_table(comparison_grid(found)))
    for line in other_settings(found):
        typer.echo(f"Not the same in all runs: {line}.")
    typer.echo(f"{written} has the table and the figure.")
