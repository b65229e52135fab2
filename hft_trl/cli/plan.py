"""`hft-trl plan`: the memory that training a model needs, and the settings that fit a machine."""

import dataclasses
import json
import re
from typing import Annotated, Literal

import typer
from rich.console import Console

from hft_trl.cli.shared import AsJson, OfMatrices, Revision, TrustRemoteCode, given, quiet, setting
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError, exit_on_user_error

app = typer.Typer()

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30}
BATCH = {"sft": 128, "dpo": 32}  # of the recipes


@app.command(
    "plan",
    epilog="Built in, without network access: Llama-2-7b-hf, -7b-chat-hf, -13b-hf, -70b-hf, Llama-3.1-8B, -70B, "
    "Llama-3.2-1B (meta-llama/), Qwen3-0.6B-Base, -4B-Base, -8B-Base (Qwen/), SmolLM3-3B-Base (HuggingFaceTB/) and "
    "Olmo-3-7B-Think-SFT (allenai/). Exit code 0 also if nothing fits.",
)
@exit_on_user_error()
def plan_command(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, built-in shape, demo or smollm2. Only its config is read.")
    ],
    method: Annotated[
        Literal["hft", "fft"] | None, typer.Option(help="Plan for this method only. [default: both]")
    ] = None,
    stage: Annotated[Literal["sft", "dpo"], typer.Option(help="Stage of training.")] = "sft",
    gpus: Annotated[int, typer.Option(help="Total number of GPUs.")] = 1,
    gpu_memory: Annotated[str, typer.Option(help="Memory per GPU, such as 80GB (10^9 bytes) or 80GiB.")] = "80GB",
    sequence_length: Annotated[
        int | None, typer.Option(help="Longest row in tokens. [default: the model's positions, at most 4096]")
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(help="Rows per optimizer step. [default: sft 128, dpo 32]")
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            help="single, ddp, fsdp2, zero2 or zero3. [default: single for one GPU, else the first of ddp and fsdp2 "
            "that fits]"
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of the weights, as model.dtype in a recipe.")] = "float32",
    optim: Annotated[str, typer.Option(help="Optimizer, as in a recipe.")] = "adamw_torch_fused",
    frozen_dtype: Annotated[str | None, setting("frozen_dtype")] = None,
    frozen_quantization: Annotated[Literal["int8", "nf4"] | None, setting("frozen_quantization")] = None,
    optimizer_in_backward: Annotated[
        bool,
        typer.Option(
            "--optimizer-in-backward",
            help="Update parameters inside the backward pass, without gradient accumulation. [default: false]",
        ),
    ] = False,
    replicate_frozen: Annotated[
        bool,
        typer.Option(
            "--replicate-frozen", help="Keep the frozen half whole on each GPU under fsdp2. [default: false]"
        ),
    ] = False,
    ratio: Annotated[float | None, setting("ratio")] = None,
    strategy: Annotated[OfMatrices | None, setting("strategy", "How the trained half is chosen.")] = None,
    seed: Annotated[int | None, setting("seed")] = None,
    train_embeddings: Annotated[bool | None, setting("train_embeddings")] = None,
    write: Annotated[
        str | None, typer.Option(help="Folder to write recipe.yaml and launch.sh of both stages to.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """
    Plan memory, micro-batch, activation checkpointing and launch configuration from a model's config.

    A training step is traced without weights, for full and half fine-tuning.
    """
    memory = parse_memory(gpu_memory)
    if gpus > 8 and gpus % 8:
        raise HFTError(f"--gpus is {gpus}: with more than one machine of 8 GPUs, use a multiple of 8.")
    settings = given(**locals() | {"method": None})
    configs = {name: HFTConfig(method=name, **settings) for name in ("fft", "hft")}
    with quiet(), Console(stderr=True, quiet=as_json).status(f"Reading the config of {model}") as status:
        from hft_trl.chat import most_tokens
        from hft_trl.planning.fit import TIGHT, Planner, operations_ratios
        from hft_trl.planning.memory import Storage, Task
        from hft_trl.planning.show import heading, memory_grid, new_files, plan_json, task_json, what_helps
        from hft_trl.planning.show import write as write_plan
        from hft_trl.report.tables import rich_table
        from hft_trl.selection.previous import selection_of
        from hft_trl.skeleton import build_on_meta, shape_of

        if write is not None:
            new_files(write)
        storage = Storage(dtype, frozen_dtype, optim, frozen_quantization, optimizer_in_backward, replicate_frozen)
        length, batch = sequence_length, BATCH[stage] if global_batch is None else global_batch
        layouts = () if launch is None else (launch,)
        # Settings that do not fit together are rejected before the model's config is read
        task = Task(stage, gpus, memory, 2 if length is None else length, batch, storage, layouts)
        skeleton = build_on_meta(model if revision else shape_of(model), revision, trust_remote_code)
        positions = most_tokens(skeleton) or length or 4096
        if length is not None and length > positions:
            raise HFTError(
                f"--sequence-length is {length}, but {model!r} has {positions} positions: use at most {positions}."
            )
        task = dataclasses.replace(task, sequence_length=length or min(4096, positions))
        previous = selection_of(skeleton, revision)
        planners = {name: Planner(skeleton, config, previous) for name, config in configs.items()}
        for planner in planners.values():
            planner.tell = status.update
        shown = [method] if method else ["fft", "hft"]
        for name in shown:
            planners[name].check_types(task)
        plans = [planners[name].plan(task) for name in shown]
        helps = [[] if plan.fits else what_helps(planners[plan.method], task, plan) for plan in plans]
        ratios = operations_ratios(planners, task, plans)
        written = ()
        if write is not None:
            chosen = method or "hft"
            other = "dpo" if stage == "sft" else "sft"
            batch = max(BATCH[other] // gpus, 1) * gpus  # that of the recipes, divisible by the GPUs
            if optimizer_in_backward:  # the whole batch is on the GPU at once
                batch = task.global_batch
            stages = planners[chosen].both_stages(task, dataclasses.replace(task, stage=other, global_batch=batch))
            written = write_plan(write, model, configs[chosen], stages, revision, trust_remote_code)
    if as_json:
        found = {plan.method: plan_json(plan, ways) for plan, ways in zip(plans, helps, strict=True)}
        typer.echo(json.dumps({**task_json(model, task), "plans": found, "operations_ratio": ratios}, indent=2))
        return
    console = Console(highlight=False)
    console.print(heading(model, task), style="bold", soft_wrap=True, markup=False)
    console.print(rich_table(memory_grid(plans)))
    for plan, ways in zip(plans, helps, strict=True):
        if plan.fits and plan.left < TIGHT:
            text = f"{plan.method.upper()} fits with {100 * plan.left:.1f} % left: kernels and other programs may need"
            console.print(f"{text} more. A smaller --sequence-length or more --gpus leave a margin.", soft_wrap=True)
        if not plan.fits:
            missing = f"{(plan.total - plan.available) / 1e9:,.1f} GB are missing on each GPU."
            advice = "What would help:" if ways else "No other flag would help."
            console.print(f"{plan.method.upper()} does not fit: {missing} {advice}", soft_wrap=True)
            for flags, other in ways:
                verdict = "fits" if other.fits else "not enough"
                verdict += " with sync_each_batch" if other.sync_each_batch else ""
                console.print(f"  {flags}: {other.total / 1e9:,.1f} GB, {verdict}", soft_wrap=True)
    if (same := ratios["equal_settings"]) is not None:
        console.print(f"HFT's step computes {same:.2f} of FFT's with the same settings", soft_wrap=True)
    if (own := ratios["as_planned"]) is not None:
        console.print(f"and {own:.2f} of it as planned here", soft_wrap=True)
    console.print("Computed from the shapes, not measured; see docs/plan.md.", soft_wrap=True)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, markup=False)


def parse_memory(text: str) -> int:
    """Bytes of a size such as `80GB` (10^9 bytes) or `80GiB` (2^30)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise HFTError(f"--gpu-memory is {text!r}: use a number with MB, GB, TB, MiB or GiB, such as 80GB.")
    size = int(float(match[1]) * UNITS[match[2].upper()])
    if size <= 10**9:
        raise HFTError(f"--gpu-memory is {text!r}, and 1 GB of it is reserved: use more, such as 24GB.")
    return size
