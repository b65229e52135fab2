r"""
Compare what a model learns with what it keeps, for several methods and learning rates.

Without arguments it runs on the embedded model and data, in a few minutes on two CPU cores:

```bash
python recipes/frontier.py
```

On your own model and data, with one process per GPU (the file's `use_cpu` is for a machine without one):

```bash
python recipes/frontier.py --config recipes/configs/frontier-smollm2.yaml --model Qwen/Qwen3-0.6B-Base \
    --sft.dataset my_chats --retention.texts general.txt --retention.prompts questions.jsonl --output_dir runs/mine \
    --methods fft hft lora --learning_rates 1e-5 3e-5 1e-4 lora=3e-4 lora=1e-3 --seeds 3
```

The sections are those of `sft_then_dpo.py` without `dpo`, and `frontier` (also as flags without a section, such as
`--methods` and `--seeds`): methods, learning_rates, ratios, seeds, average, half_reset, kept, tasks, lora_rank,
workers. Each FFT and HFT model is also averaged with the base, and each FFT model half reset, which costs no training.
The same command again resumes a stopped run. In `output_dir`: `frontier.json`, `frontier.png` and `frontier.md`.
"""

import sys
from pathlib import Path

from hft_trl import exit_on_user_error
from hft_trl.experiments.frontier_report import print_frontier, write_frontier
from hft_trl.experiments.frontier_trial import frontier_points, parse_frontier
from hft_trl.experiments.runner import run_points
from rich.progress import MofNCompleteColumn, Progress


def main(argv: list[str]) -> None:
    recipe, grid, flags = parse_frontier(argv, help_text=__doc__)
    output = Path(recipe.run.output_dir)

    # Mistakes are found before anything is trained
    trials = frontier_points(recipe, grid, flags)
    files = [trial.result for trial in trials]

    # Train and measure; the results are up to date after each model
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        bar = progress.add_task("models", total=len(trials), completed=sum(file.exists() for file in files))
        for _ in run_points(trials, output, grid.workers):
            write_frontier(output, files, grid, argv)
            progress.advance(bar)

    # Which method keeps most at an equal task loss
    print_frontier(write_frontier(output, files, grid, argv), output)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
