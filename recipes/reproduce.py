"""
The paper's questions on the embedded world: base, FFT and HFT for SFT; FFT and HFT for DPO from either; Half-Reset and
averaging; strategies; ratios from 0.1 to 1.0; embedding and head; a fresh, the same or the other half; a frozen half
in 8 or 4 bits.

```bash
python recipes/reproduce.py --seeds 10
```

It runs one process per core, with one thread each. The same command resumes an interrupted run. `--questions sft,dpo`
asks only some; flags of `sft_then_dpo.py` hold for every run:

```bash
python recipes/reproduce.py --seeds 3 --sweep_seeds 3 --questions sft --sft.learning_rate 5e-4 --output_dir runs/slower
```

In `output_dir`: `scores/` (a JSON file for each model), `results.md` and a figure for each question. The paired tests
need scipy: `pip install -c constraints.txt -e ".[eval]"`.
"""

import argparse
import shlex
import sys
from datetime import UTC, datetime

from hft_trl import exit_on_user_error
from hft_trl.experiments.bars import write_figures
from hft_trl.experiments.paired_tests import check_tests, tables, write_results
from hft_trl.experiments.questions import QUESTIONS, needed
from hft_trl.experiments.trials import read_scores, run_trials
from hft_trl.redact import redact
from hft_trl.report import environment
from hft_trl.report.tables import rich_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, default=10, help="Seeds for FFT against HFT (10).")
    parser.add_argument("--sweep_seeds", type=int, default=5, help="Seeds for the sweeps (5), no more than --seeds.")
    parser.add_argument("--questions", default="all", help=f"Some of {','.join(q.name for q in QUESTIONS)}.")
    parser.add_argument("--output_dir", default="runs/reproduce", help="Folder of the scores (runs/reproduce).")
    parser.add_argument("--workers", type=int, default=None, help="Processes at a time, by default one per core.")
    options, flags = parser.parse_known_args(argv)
    names = {question.name for question in QUESTIONS}
    if options.questions != "all" and not set(options.questions.split(",")) <= names:
        parser.error(f"--questions {options.questions}: choose from {', '.join(sorted(names))}, or all")
    if options.seeds < 1 or options.sweep_seeds < 1:
        parser.error("--seeds and --sweep_seeds must be at least 1")
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers {options.workers}: it must be at least 1, or be left out for one per core")
    return options, flags


def main(options: argparse.Namespace, flags: list[str]) -> None:
    asked = [q for q in QUESTIONS if options.questions == "all" or q.name in options.questions.split(",")]
    sweep_seeds = min(options.seeds, options.sweep_seeds)
    check_tests()

    # Make and score every model that is not scored yet
    console = Console()
    columns = (TextColumn("models"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("models")
        for done, total in run_trials(
            needed(asked), options.seeds, sweep_seeds, options.output_dir, options.workers, flags
        ):
            progress.update(bar, completed=done, total=total)

    # Answer
    scores = read_scores(options.output_dir)
    seeds = max(len(scores[run.name]) for run in needed(asked))
    found = environment()
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "trl"))
    command, date = shlex.join(redact(sys.argv[1:])), f"{datetime.now(UTC):%Y-%m-%d}"
    head = f"""# The paper's questions on the embedded world

Made by `python recipes/reproduce.py {command}` until {date} ({versions}). Scores in percent, mean
(standard deviation) over the seeds that `scores/` holds, also those of earlier calls: {seeds} at most.
Differences are taken seed by seed; p is from a two-sided paired t-test, not corrected for multiple comparisons."""
    write_figures(asked, scores, options.output_dir)
    path = write_results(asked, scores, options.output_dir, head)
    for question in asked:
        for grid in tables(question, scores):
            console.print(rich_table(grid))
    console.print(f"{path} has all of it, with a figure for each question.", markup=False)


if __name__ == "__main__":
    with exit_on_user_error():
        main(*parse(sys.argv[1:]))
