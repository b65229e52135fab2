"""`hft-trl evaluate` and `generate`: what models know and can do."""

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from hft_trl.cli.shared import quiet
from hft_trl.errors import HFTError, exit_on_user_error
from hft_trl.evaluation import options, parse_suites, print_evaluation, write_evaluation

app = typer.Typer()


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
    with quiet(logging.WARNING):  # the harness warns of prompts that don't fit, which it cuts
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
    with quiet():
        from hft_trl.evaluation.alpaca import check_output, read_prompts, replies, write_outputs

        rows = read_prompts(prompts)[:limit]
        check_output(output)
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
