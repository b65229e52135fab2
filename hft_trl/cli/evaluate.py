"""`hft-trl evaluate` and `generate`."""

import json
import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from hft_trl.cli.shared import AsJson, quiet
from hft_trl.errors import HFTError, exit_on_user_error
from hft_trl.evaluation import parse_suites, print_evaluation, write_evaluation

app = typer.Typer()

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
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each (sub)task; by default all.")] = None,
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
    suites = parse_suites(suite)
    with quiet(logging.WARNING):  # the harness warns of prompts that it truncates
        from accelerate import PartialState

        from hft_trl.evaluation.run import evaluate_models, find_models

        evaluation = evaluate_models(
            find_models(models, base),
            suites,
            chat_template=chat_template,
            dtype=dtype,
            batch_size=batch_size,
            limit=limit,
            run_code=run_code,
            cache=cache,
            backend=backend,
        )
        if not PartialState().is_main_process:
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
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model, demo (embedded) or smollm2.")],
    prompts: Annotated[Path, typer.Option(help="Local copy of AlpacaEval's alpaca_eval.json.")],
    alpaca_eval: Annotated[bool, typer.Option("--alpaca-eval", help="Write alpaca_eval's format.")] = False,
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("runs/alpaca_eval/outputs.json"),
    generator: Annotated[str | None, typer.Option(help="Name in the outputs; by default MODEL.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of prompts; by default all.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a reply, in tokens.")] = 2048,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    chat_template: ChatTemplate = None,
) -> None:
    """
    Write a model's greedy replies to a file of prompts.

    The file is for the judge of the alpaca_eval project: alpaca_eval --model_outputs FILE.
    """
    if not alpaca_eval:
        raise HFTError("the format of the outputs is missing: pass --alpaca-eval, the only format so far.")
    with quiet():
        from hft_trl.evaluation.alpaca import write_replies

        written = write_replies(
            model,
            prompts,
            output,
            generator or model,
            limit=limit,
            chat_template=chat_template,
            dtype=dtype,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )
    typer.echo(f"Written: {output}, {written} replies")
