"""
Every approach of continual learning with each method, over seeds, on the embedded mini benchmark.

```bash
python benchmarks/continual.py --seeds 5 --output_dir docs/continual
```

A run is `recipes/continual.py` in its own process with one thread, as many at a time as there are cores. The same
command resumes an interrupted run. A seed decides the selection, the order of the rows, the adapters' first values and
which rows are mixed in; the tasks are the same. Flags of the recipe hold for every run, such as `--sft.max_steps 4`.

In `output_dir`: `scores/` (the `scores.json` of each run), `results.md` and `grid.png`. The paired tests need scipy:
`pip install -c constraints.txt -e ".[eval,continual]"`.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hft_trl import HFTError, exit_on_user_error
from hft_trl.continual.rounds import WITHOUT_TRANSFER
from hft_trl.experiments.frontier import check_tests, paired
from hft_trl.experiments.runner import Point, check_settings, result_file, run_points
from hft_trl.files import replacing
from hft_trl.redact import redact
from hft_trl.report import environment
from hft_trl.report.figures import BLUE, GREY, ORANGE, panels
from hft_trl.report.tables import Grid, rich_table, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
MEASURED = {
    "op": "OP",
    "bwt": "BWT",
    "bwt_t_minus_1": "BWT (t - 1)",
    "knowledge": "knowledge",
}
# The lowest of 5e-4, 1e-3 and 2e-3 at which every task was learned (seed 11), as 2e-4 is for the model's own weights.
ADAPTER_FLAGS = ("--sft.learning_rate", "1e-3")
COLOURS = {"fft": ORANGE, "hft": BLUE, "": GREY}


class Run(NamedTuple):
    """An approach with a method, which is empty for adapters: they have none."""

    approach: str
    method: str

    @property
    def name(self) -> str:
        return f"{self.approach}-{self.method}" if self.method else self.approach


GRID = (
    *(
        Run(approach, method)
        for approach in ("sequential", "gem", "replay", "multitask", "individual")
        for method in ("fft", "hft")
    ),
    Run("lora", ""),
    Run("o_lora", ""),
)

Scores = dict[str, dict[int, dict[str, float]]]
"""Scores in percent: by run, by seed, by name."""

OWN = re.compile(
    r"--(config|approach|method|output_dir|overwrite|model(\..*)?|tasks|benchmark|hft\..*|lora\..*"
    r"|sft\.(seed|learning_rate))"
)
"""Flags in which the runs differ, or that would contradict the labels of the table."""


def command(run: Run, seed: int, folder: Path, flags: Iterable[str]) -> list[str]:
    """The command of one run."""
    words = ["--approach", run.approach, "--output_dir", str(folder.resolve()), "--sft.seed", str(seed)]
    words += ["--method", run.method, "--hft.seed", str(seed)] if run.method else ADAPTER_FLAGS
    return [sys.executable, str(ROOT / "recipes" / "continual.py"), *words, "--sft.disable_tqdm", "true", *flags]


def point(run: Run, seed: int, output: Path, flags: Iterable[str]) -> Point:
    """The point of one run."""
    name = f"{run.name}-{seed}"
    folder = output / "runs" / name
    return Point(name, tuple(command(run, seed, folder, flags)), folder / "scores.json")


def keep(done: Point, output: Path) -> None:
    """Keep the scores of a finished run, and remove its models."""
    with replacing(result_file(output, done.name)) as new:  # written completely or not at all
        shutil.copy(done.result, new)
    shutil.rmtree(done.result.parent)


def read(output: Path, runs: Iterable[Run]) -> Scores:
    """Scores after the last round by run and seed; knowledge only where one model learned every task."""
    found: Scores = {}
    for run in runs:
        for path in sorted(output.glob(f"scores/{run.name}-*.json")):
            content, seed = json.loads(path.read_text(encoding="utf-8")), int(path.stem.rpartition("-")[2])
            found_in = (content["approach"], content["method"] or "", content["settings"]["seed"])
            if found_in != (*run, seed):
                raise HFTError(f"{path} holds scores of {found_in}: remove it, and run the same command again.")
            values = {key: content[key][-1] for key in ("op", "bwt", "bwt_t_minus_1")}
            if run.approach in WITHOUT_TRANSFER:
                values["bwt"] = values["bwt_t_minus_1"] = None
            values["knowledge"] = content["probes"].get(content["rounds"][-1]["name"], {}).get("knowledge")
            found.setdefault(run.name, {})[seed] = {k: v for k, v in values.items() if v is not None}
    return found


def grids(runs: Iterable[Run], scores: Scores) -> list[Grid]:
    """Mean (standard deviation) of every run over its seeds, and HFT less FFT seed by seed."""
    means, differences = [], []
    for run in runs:
        seeds = scores.get(run.name, {})
        cells = [mean_cell([found[key] for found in seeds.values() if key in found]) for key in MEASURED]
        means.append([run.approach, run.method.upper() or "-", str(len(seeds)), *cells])
        others = scores.get(Run(run.approach, "fft").name, {}) if run.method == "hft" else {}
        for key, label in MEASURED.items():
            both = [seed for seed in seeds if key in seeds[seed] and key in others.get(seed, {})]
            if both and key != "bwt_t_minus_1":
                found = paired([seeds[seed][key] - others[seed][key] for seed in both])
                differences.append([run.approach, label, *found.cells(1)])
    return [
        Grid("After the last round", ["approach", "method", "seeds", *MEASURED.values()], means),
        Grid("HFT less FFT", ["approach", "score", "mean", "95 % interval", "p", "HFT higher"], differences),
    ]


def mean_cell(values: Sequence[float]) -> str:
    """Return mean and standard deviation over the seeds, for a table."""
    return f"{fmean(values):.1f}" + (f" ({stdev(values):.1f})" if len(values) > 1 else "") if values else "-"


def figure(runs: Iterable[Run], scores: Scores) -> "Figure":
    """A panel for each score with a bar for each run, every seed a point."""
    runs = [run for run in runs if scores.get(run.name)]
    shown = [key for key in MEASURED if key != "bwt_t_minus_1"]
    drawing, drawn = panels(len(shown))
    for key, axes in zip(shown, drawn, strict=True):
        axes.axhline(0, color="#999999", linewidth=0.8)
        for place, run in enumerate(runs):
            values = [found[key] for found in scores[run.name].values() if key in found]
            if values:
                axes.bar(place, fmean(values), 0.7, color=COLOURS[run.method], alpha=0.35)
                axes.plot([place] * len(values), values, "o", color=COLOURS[run.method], markersize=3.5)
            if len(values) > 1:
                axes.errorbar(place, fmean(values), stdev(values), color="black", capsize=4, linewidth=1.2)
        labels = [f"{run.approach} {run.method.upper()}".strip() for run in runs]
        axes.set_xticks(range(len(runs)), labels, rotation=60, ha="right", fontsize=8)
        axes.set_title(MEASURED[key])
    return drawing


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, default=5, help="Number of seeds (5).")
    parser.add_argument("--approaches", default="all", help="Comma-separated approaches, by default all.")
    parser.add_argument("--output_dir", default="runs/continual-grid", help="Folder (runs/continual-grid).")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Runs at a time, by default one per core.")
    options, flags = parser.parse_known_args(argv)
    known = {run.approach for run in GRID}
    options.approaches = known if options.approaches == "all" else set(options.approaches.split(","))
    if not options.approaches <= known:
        parser.error(f"--approaches: choose from {', '.join(sorted(known))}")
    own = next((flag for flag in flags if OWN.fullmatch(flag.partition("=")[0])), None)
    if own is not None:
        parser.error(f"{own} is what the runs differ in and cannot be the same for all: drop it")
    for name in ("seeds", "workers"):
        if vars(options)[name] < 1:
            parser.error(f"--{name} {vars(options)[name]}: it must be at least 1")
    return options, flags


def main(options: argparse.Namespace, flags: list[str]) -> None:
    output, console = Path(options.output_dir), Console()
    check_tests()
    settings = {"flags": shlex.join(redact(flags)), "adapters": shlex.join(ADAPTER_FLAGS)}
    check_settings(output, settings, ("peft", "quadprog"))
    runs = [run for run in GRID if run.approach in options.approaches]

    # Make what has no scores yet
    points = [point(run, seed, output, flags) for seed in range(1, options.seeds + 1) for run in runs]
    for each in points:
        if each.result.exists():  # an earlier call was stopped right after it
            keep(each, output)
    waiting = [each for each in points if not result_file(output, each.name).exists()]
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("runs", total=len(points), completed=len(points) - len(waiting))
        for each in run_points(waiting, output, options.workers):
            keep(each, output)
            progress.advance(bar)

    # Write and print the results
    scores, found = read(output, GRID), environment()
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "trl", "python"))
    means, differences = grids([run for run in GRID if run.name in scores], scores)
    figure(GRID, scores).savefig(output / "grid.png", dpi=130, facecolor="white")
    command_line, date = shlex.join(redact(sys.argv[1:])), f"{datetime.now(UTC):%Y-%m-%d}"
    text = f"""# Continual learning on the embedded mini benchmark

Made by `python benchmarks/continual.py {command_line}` until {date} on {os.cpu_count()} cores
({found["device"]}; {versions}). Mean (standard deviation) over the seeds, scores from 0 to 100, after the last of
eight rounds. OP and BWT: [continual.md](../continual.md). Knowledge is that of the embedded world's probes, 100 in
the base. Seeds differ in all but the tasks: every test set has 32 to 64 rows, and the deviations do not include their
choice. Adapters learn at {ADAPTER_FLAGS[1]}, all else at the demo's rate. GEM keeps 64 of the 192 rows of each earlier
task, replay mixes in 10 % and general chats.

{table(means)}

HFT less FFT, seed by seed; p is from a two-sided paired t-test, not corrected for multiple comparisons.

{table(differences)}

![OP, BWT and knowledge by approach](grid.png)
"""
    (output / "results.md").write_text(text, encoding="utf-8")
    for grid in (means, differences):
        console.print(rich_table(grid))


if __name__ == "__main__":
    with exit_on_user_error():
        main(*parse(sys.argv[1:]))
