r"""
Time and memory of a training step: full fine-tuning, HFT, and what to hold them against.

```bash
python benchmarks/step.py                                        # a small Llama on a CPU, one of 1.5B on a GPU
python benchmarks/step.py --json                                 # one JSON object, and nothing else, on stdout
python benchmarks/step.py --ratios 0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0   # the paper's efficiency table
python benchmarks/step.py --shape 7b --stages sft --batch 1      # random weights, made on the device
# Full-rank HFT of a model of 8B on a GPU of 24 GB
python benchmarks/step.py --shape 8b --stages sft --variants hft --checkpointing on --optim adamw_bnb_8bit \
    --hft '{"frozen_quantization": "nf4", "optimizer_in_backward": true, "train_embeddings": false}'
python benchmarks/step.py --shape 7b --stages sft --batch 4 --equal-memory 56   # the fastest settings that fit
```

`fft` and `lora` are TRL's own trainers, `hft` is ours as a recipe runs it, `stock` is TRL's own trainer with the very
mask of `hft`, so that the two differ by what our trainer adds to a step. All have the same tokens and start weights.

A step is an epoch of one batch in the trainer's own loop, callbacks and all. All variants of a stage take turns, in an
order shuffled again for each round, so that whatever else the machine does falls on all alike; where they do not fit
beside each other, they run one after the other and then once more (A B A B). Seconds are medians with quartiles. A
quotient is the median over the rounds of the quotient of the two steps of one round.

`--equal-memory` tries the settings of each variant alone: rows of a forward pass (divisors of the batch; the gradients
of a whole batch are accumulated), checkpointing of no layer, every second one (SFT) or all, and on a GPU Liger on or
off where it is installed. Those whose peak is too high, or that run out of memory, do not fit. On a CPU the peak is
the resident memory of a child process.
"""

import argparse
import contextlib
import datetime
import gc
import importlib.util
import json
import multiprocessing
import random
import re
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table
from step_run import BYTES, PARTS, SHAPES, STAGES, VARIANTS, Run, Setting

from hft_trl import HFTConfig, exit_on_user_error
from hft_trl.recipe.measure import peak_memory, reset_peak_memory
from hft_trl.report import environment


def alone(setting: Setting, options: argparse.Namespace, steps: int) -> tuple[int, list[dict[str, float]]]:
    """Return peak bytes of steps over what the process held before the model was built, and the steps' seconds."""
    tiny = {"hidden": 64, "intermediate": 64, "layers": 1, "heads": 1, "kv_heads": 1, "length": 8}
    Run(setting, argparse.Namespace(**{**vars(options), **tiny}))  # so that no import counts
    gc.collect()
    reset_peak_memory()
    before = peak_memory()
    run = Run(setting, options)
    reset_peak_memory()
    for _ in range(steps):
        run.step()
    return peak_memory() - before, run.steps


def by_itself(setting: Setting, options: argparse.Namespace, steps: int) -> tuple[int | None, list[dict[str, float]]]:
    """Return the setting's [`alone`], on a CPU from a child process. A setting that does not fit has no peak."""
    try:
        if options.device == "cuda":
            return alone(setting, options, steps)
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:  # all is imported in a fork
            return pool.submit(alone, setting, options, steps).result()
    except (torch.OutOfMemoryError, BrokenProcessPool):
        return None, []


def take_turns(settings: Sequence[Setting], options: argparse.Namespace, blocks: bool) -> list[dict[str, Any]]:
    """Return steps of all settings in turn, or in two blocks of each. A setting that does not fit has none."""
    records = {setting: {**asdict(setting), "bytes": {}, "losses": [], "steps": []} for setting in settings}
    rng = random.Random(0)
    for group in [[setting] for setting in settings] * 2 if blocks else [settings]:
        with contextlib.suppress(torch.OutOfMemoryError):
            _run_group(group, records, options, options.rounds // (2 if blocks else 1), rng)
    return list(records.values())


def _run_group(
    group: Sequence[Setting],
    records: dict[Setting, dict[str, Any]],
    options: argparse.Namespace,
    rounds: int,
    rng: random.Random,
) -> None:
    """Add steps of the settings to their records. No run is left when it returns."""
    runs = {setting: Run(setting, options) for setting in group}
    for _ in range(rounds):
        for setting in rng.sample(group, len(group)):
            runs[setting].step()
    for setting, run in runs.items():
        records[setting]["losses"] = [float(loss) for loss in run.losses]
        records[setting]["bytes"] = run.sizes()
        records[setting]["steps"] += run.steps


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Return median and quartiles, `None` of less than two values."""
    values = list(values)
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else None
    return dict(zip(("low", "median", "high"), quartiles, strict=True)) if quartiles else None


def measure(settings: Sequence[Setting], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return records of the settings of one stage, each with its time as a quotient to another's."""
    records, blocks = take_turns(settings, options, options.blocks), options.blocks
    if not blocks and not any(row["steps"] for row in records):  # they do not fit beside each other
        records, blocks = take_turns(settings, options, True), True
    steps = {(row["variant"], row["checkpointing"]): row["steps"] for row in records if row["variant"] != "hft"}
    for row in records:
        row["measured"] = "blocks" if blocks else "interleaved"
        row["seconds"] = {part: spread(step[part] for step in row["steps"]) for part in PARTS}
        others = {"fft": ("fft", row["checkpointing"]), "fft_with_checkpointing": ("fft", True)}
        others["stock"] = ("stock", row["checkpointing"])
        pairs = {name: zip(row["steps"], steps.get(other, []), strict=False) for name, other in others.items()}
        row["time_to"] = {name: spread(a["total"] / b["total"] for a, b in both) for name, both in pairs.items()}
    return records


def micro_batches(options: argparse.Namespace, variant: str) -> list[int]:
    """Return the rows of a forward pass to try. The optimizer in the backward pass rules out accumulation."""
    if variant == "hft" and options.hft.get("optimizer_in_backward"):
        return [options.batch]
    return [rows for rows in range(1, options.batch + 1) if options.batch % rows == 0]


def search(stage: str, variant: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a record of each setting of a variant, with its peak and whether that is below the memory."""
    # Of TRL 1.16's trainers only SFT can skip layers
    recomputed = [(False, 1), (True, 2), (True, 1)] if stage == "sft" else [(False, 1), (True, 1)]
    tokens = options.batch * options.length * (1 if stage == "sft" else 2)
    records = []
    for checkpointing, every in recomputed:
        for liger in (False, True) if options.liger else (False,):
            for rows in micro_batches(options, variant):
                setting = Setting(stage, variant, checkpointing, 0.5, rows, every, liger)
                most, steps = by_itself(setting, options, options.rounds)
                fits = most is not None and most < options.equal_memory * 1e9
                speed = spread(tokens / step["total"] for step in steps)
                records.append({"setting": setting, "peak": most, "fits": fits, "tokens_per_second": speed})
                if not fits:  # more rows need more memory
                    break
    return records


def equal_memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """
    Return the fastest setting of each variant that stays below the memory, after all that were tried.

    The fastest ones are measured again, one after the other and then once more. `fastest` holds the second result.
    """
    found = []
    for stage in options.stages:
        tried = [search(stage, variant, options) for variant in options.variants]
        fitting = [[row for row in rows if row["fits"]] for rows in tried]
        best = [max(rows, key=lambda row: row["tokens_per_second"]["median"]) for rows in fitting if rows]
        again = take_turns([row["setting"] for row in best], options, True)
        full = next((row["steps"] for row in again if row["variant"] == "fft"), [])
        tokens = options.batch * options.length * (1 if stage == "sft" else 2)
        for row, record in zip(best, again, strict=True):
            pairs = zip(record["steps"], full, strict=False)
            row["fastest"] = {
                "tokens_per_second": spread(tokens / step["total"] for step in record["steps"]),
                "time_to_fft": spread(ours["total"] / theirs["total"] for ours, theirs in pairs),
            }
        found += [{**asdict(row.pop("setting")), **row} for rows in tried for row in rows]
    return found


def speed_table(records: Sequence[dict[str, Any]], memory: float) -> Table:
    """Return the settings that were tried below a memory in GB, a row each."""
    columns = ("stage", "variant", "micro-batch", "checkpointing", "Liger", "peak GB", "tokens/s")
    table = Table(*columns, "fastest, again", "time per token to FFT", title=f"below {memory:g} GB")
    for row in records:
        layers = {1: "full", 2: "every second layer"}[row["every_n_layers"]] if row["checkpointing"] else "none"
        most = "out of memory" if row["peak"] is None else f"{row['peak'] / 1e9:.3f}"
        speed, best = row["tokens_per_second"], row.get("fastest", {})
        again, to_fft = best.get("tokens_per_second"), best.get("time_to_fft")
        table.add_row(
            *(row["stage"], row["variant"], str(row["micro_batch"]), layers, "on" if row["liger"] else "off", most),
            f"{speed['median']:,.0f}" if speed and row["fits"] else "does not fit",
            f"{again['median']:,.0f}" if again else "",
            f"{to_fft['median']:.3f}" if to_fft else "",
        )
    return table


def tables(records: Sequence[dict[str, Any]]) -> tuple[Table, Table]:
    """Return seconds and bytes of the records, a row each."""
    name = ("stage", "checkpointing", "variant")
    quotients = {"to FFT": "fft", "to FFT, checkpointing on": "fft_with_checkpointing", "to stock": "stock"}
    times = Table(*name, *PARTS, "quartiles", *quotients, "measured", title="seconds")
    sizes = Table(*name, *BYTES, title="MB")
    for row in records:
        share = f" {row['ratio']:.0%}" if row["variant"] == "hft" else ""
        name = (row["stage"], "on" if row["checkpointing"] else "off", row["variant"] + share)
        total, to = row["seconds"]["total"], row["time_to"]
        times.add_row(
            *name,
            *(f"{row['seconds'][part]['median']:.4f}" if total else "does not fit" for part in PARTS),
            f"{total['low']:.4f} {total['high']:.4f}" if total else "",
            *(f"{to[other]['median']:.3f}" if to[other] else "" for other in quotients.values()),
            row["measured"],
        )
        sizes.add_row(*name, *("" if row["bytes"].get(k) is None else f"{row['bytes'][k] / 1e6:,.1f}" for k in BYTES))
    return times, sizes


def machine() -> str:
    """Return the name of the GPU or the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else "unknown CPU"


def numbers(text: str) -> list[float]:
    """Read numbers with commas between."""
    return [float(number) for number in text.split(",")]


def more_settings(text: str) -> dict[str, Any]:
    """Read settings of HFT in JSON, beside the ratio."""
    try:
        settings = json.loads(text)
        HFTConfig(**settings, ratio=0.5)
    except (ValueError, TypeError) as error:  # of JSON, of a value, or of a name
        raise argparse.ArgumentTypeError(f"{text} are no settings of HFT beside its ratio: {error}") from error
    return settings


def parse(argv: list[str]) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b" if cuda else "small")
    for name in SHAPES["8b"]:
        parser.add_argument(f"--{name}", type=int, help="by default the shape's")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", help="of the weights")
    parser.add_argument("--optim", default="adamw_torch_fused", help="optimizer of all variants")
    parser.add_argument(
        "--hft", type=more_settings, default={}, help="JSON: more settings of HFT, for the variant hft"
    )
    parser.add_argument("--rounds", type=int, default=12, help="steps of each, at least 2")
    columns = {"stages": STAGES, "variants": VARIANTS, "checkpointing": ("off", "on")}
    for name, choices in columns.items():
        parser.add_argument(f"--{name}", nargs="+", choices=choices, help="by default all")
    parser.add_argument("--ratios", type=numbers, help="FFT, and HFT of such ratios as 0.1,0.5: SFT, no checkpointing")
    parser.add_argument(
        "--equal-memory",
        type=float,
        metavar="GB",
        help="the fastest of each variant's settings (rows of a forward pass, checkpointing, Liger) that stays below "
        "so much memory (10^9 bytes, beyond what the process holds without a model), at --batch rows a step",
    )
    parser.add_argument("--blocks", action="store_true", help="one variant after the other, twice")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if options.rounds < 2:
        parser.error("--rounds: give at least 2")
    if options.equal_memory is not None:
        if not options.equal_memory > 0:
            parser.error(f"--equal-memory {options.equal_memory:g}: it must be above 0")
        given = next((name for name in ("checkpointing", "ratios", "blocks") if vars(options)[name]), None)
        if given:
            parser.error(f"--{given} and --equal-memory: drop one of them, as --equal-memory chooses the settings")
        columns = {"stages": STAGES, "variants": ("fft", "hft", "lora")} | {"checkpointing": ("off", "on")}
    if options.ratios:
        given = next((name for name in columns if vars(options)[name]), None)
        if given:
            parser.error(
                f"--{given} and --ratios: drop one of them, as --ratios is SFT of fft and hft without checkpointing"
            )
        wrong = next((ratio for ratio in options.ratios if not 0 < ratio <= 1), None)
        if wrong is not None:
            parser.error(f"--ratios {wrong:g}: each must be in (0, 1]")
        columns = {"stages": ("sft",), "variants": ("fft", "hft"), "checkpointing": ("off",)}
    for name, all_of_them in columns.items():
        setattr(options, name, vars(options)[name] or all_of_them)
    for name in SHAPES["8b"]:
        setattr(options, name, vars(options)[name] or SHAPES[options.shape].get(name))
    options.device = "cuda" if cuda else "cpu"
    options.liger = cuda and importlib.util.find_spec("liger_kernel") is not None  # its kernels need a GPU
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    groups = [
        [Setting(stage, variant, word == "on") for word in options.checkpointing for variant in options.variants]
        for stage in options.stages
    ]
    if options.ratios:
        groups = [[Setting("sft", "fft", False), *(Setting("sft", "hft", False, ratio) for ratio in options.ratios)]]
    about = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "environment": environment(),
        "options": dict(vars(options)),
    }
    with tempfile.TemporaryDirectory() as options.folder, contextlib.redirect_stdout(sys.stderr):
        if options.equal_memory is not None:
            records = equal_memory(options)
        else:
            # Peaks come first: a process that has trained keeps freed memory, which its children would use again.
            peaks = [by_itself(setting, options, 1)[0] for group in groups for setting in group]
            records = [row for group in groups for row in measure(group, options)]
            for row, most in zip(records, peaks, strict=True):
                row["bytes"]["peak"] = most
    if options.json:
        print(json.dumps({**about, "records": records}, indent=2))
    elif options.equal_memory is not None:
        Console(width=160).print(speed_table(records, options.equal_memory), about)
    else:
        Console(width=160).print(*tables(records), about)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bars()
    gc.freeze()  # to look through all that is imported takes as long as a step
    with exit_on_user_error():
        main()
