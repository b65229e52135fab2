"""The flags of `hft-trl evaluate` and of recipes/evaluate.py."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL", help="Folders or hub ids (id@revision) of the models, or demo for the embedded model."
    ),
]
Suite = Annotated[str, typer.Option(help="general, knowledge or demo; several with commas.")]
Base = Annotated[str | None, typer.Option(help="Model to compare with; by default the first MODEL.")]
Output = Annotated[Path, typer.Option(help="Folder for evaluation.json, evaluation.md and evaluation.png.")]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Ask this many items of each (sub)task only, for a quick look.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Items of a batch in each process.")]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(help="Type in which the weights are loaded; auto is the file's."),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(help="tulu or a .jinja file; by default the tokenizer's own, Tülu's if it has none."),
]
RunCode = Annotated[
    bool, typer.Option("--run-code", help="Run code that the models write (HumanEval), with the rights of this user.")
]
Cache = Annotated[
    Path | None,
    typer.Option(help="Folder of what was measured before; by default ~/.cache/hft_trl/evaluation."),
]
