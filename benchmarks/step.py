"""
Time and memory of a training step: full fine-tuning, HFT, and what to hold them against.

```bash
python benchmarks/step.py                                        # a small Llama on a CPU, one of 1.5B on a GPU
python benchmarks/step.py --json                                 # one JSON object, and nothing else, on stdout
python benchmarks/step.py --ratios 0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0   # the paper's efficiency table
python benchmarks/step.py --shape 7b --stages sft --batch 1      # random weights, made on the device
# Full-rank HFT of a model of 8B on a GPU of 24 GB
python benchmarks/step.py --shape 8b --stages sft --variants hft --checkpointing on --optim adamw_bnb_8bit \
    --hft '{"frozen_quantization": "nf4", "optimizer_in_backward": true, "train_embeddings": false}'
```

`fft` and `lora` are TRL's own trainers, `hft` is ours as a recipe runs it, `stock` is TRL's own trainer with the very
mask of `hft`, so that the two differ by what our trainer adds to a step. All have the same tokens and start weights.

A step is an epoch of one batch in the trainer's own loop, callbacks and all. All variants of a stage take turns, in an
order shuffled anew for each round, so that whatever else the machine does falls on all alike; where they don't fit
beside each other, they run one after the other and then once more (A B A B). Seconds are medians with quartiles. A
quotient is the median over the rounds of the quotient of the two steps of one round.
"""

import argparse
import contextlib
import datetime
import gc
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


def peak_alone(setting: Setting, options: argparse.Namespace) -> int:
    """Peak bytes of `peak_steps` steps over what the process held before the model was built."""
    tiny = {"hidden": 64, "intermediate": 64, "layers": 1, "heads": 1, "kv_heads": 1, "batch": 1, "length": 8}
    Run(setting, argparse.Namespace(**{**vars(options), **tiny}))  # so that no import counts
    reset_peak_memory()
    before = peak_memory()
    run = Run(setting, options)
    reset_peak_memory()
    for _ in range(options.peak_steps):
        run.step()
    return peak_memory() - before


def peak(setting: Setting, options: argparse.Namespace) -> int | None:
    """The setting's [`peak_alone`], on a CPU in a child process of its own; `None` where it does not fit."""
    try:
        if options.device == "cuda":
            return peak_alone(setting, options)
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:  # all is imported in a fork
            return pool.submit(peak_alone, setting, options).result()
    except (torch.OutOfMemoryError, BrokenProcessPool):
        return None


def take_turns(settings: Sequence[Setting], options: argparse.Namespace, blocks: bool) -> list[dict[str, Any]]:
    """Steps of all settings in turn, or in two blocks of each. A setting that does not fit has none."""
    records = {setting: {**asdict(setting), "bytes": {}, "losses": [], "steps": []} for setting in settings}
    rng = random.Random(0)
    for group in [[setting] for setting in settings] * 2 if blocks else [settings]:
        with contextlib.suppress(torch.OutOfMemoryError):
            runs = {setting: Run(setting, options) for setting in group}
            for _ in range(options.rounds // (2 if blocks else 1)):
                for setting in rng.sample(group, len(group)):
                    runs[setting].step()
            for setting, run in runs.items():
                records[setting]["losses"] = [float(loss) for loss in run.losses]
                records[setting]["bytes"] = run.sizes()
                records[setting]["steps"] += run.steps
        runs = None
    return list(records.values())


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Median and quartiles, `None` of less than two values."""
    values = list(values)
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else None
    return dict(zip(("low", "median", "high"), quartiles, strict=True)) if quartiles else None


def measure(settings: Sequence[Setting], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of the settings of one stage, each with its time as a quotient to another's."""
    records, blocks = take_turns(settings, options, options.blocks), options.blocks
    if not blocks and not any(row["steps"] for row in records):  # they don't fit beside each other
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


def tables(records: Sequence[dict[str, Any]]) -> tuple[Table, Table]:
    """Seconds and bytes of the records, a row each."""
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
    """Name of the GPU or the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else "unknown CPU"


def numbers(text: str) -> list[float]:
    """Numbers with commas between."""
    return [float(number) for number in text.split(",")]


def more_settings(text: str) -> dict[str, Any]:
    """Settings of HFT in JSON, beside the ratio."""
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
    parser.add_argument("--peak_steps", type=int, default=1, help="steps in which peak memory is looked for")
    columns = {"stages": STAGES, "variants": VARIANTS, "checkpointing": ("off", "on")}
    for name, choices in columns.items():
        parser.add_argument(f"--{name}", nargs="+", choices=choices, help="by default all")
    parser.add_argument("--ratios", type=numbers, help="FFT, and HFT of such ratios as 0.1,0.5: SFT, no checkpointing")
    parser.add_argument("--blocks", action="store_true", help="one variant after the other, twice")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if options.rounds < 2:
        parser.error("--rounds: give at least 2")
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
        # All peaks come first: a process that has trained keeps freed memory, which its children would use again.
        peaks = [peak(setting, options) for group in groups for setting in group]
        records = [row for group in groups for row in measure(group, options)]
    for row, most in zip(records, peaks, strict=True):
        row["bytes"]["peak"] = most
    if options.json:
        print(json.dumps({**about, "records": records}, indent=2))
    else:
        Console(width=160).print(*tables(records), about)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bars()
    gc.freeze()  # to look through all that is imported takes as long as a step
    with exit_on_user_error():
        main()
