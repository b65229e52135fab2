"""
HFT against full fine-tuning, LoRA, freezing the last half of the layers, and BAdam.

```bash
pip install -c constraints.txt -e ".[eval,peers]"          # scipy, peft and badam
python benchmarks/peers.py --output_dir docs/peers         # everything, on a CPU
python benchmarks/peers.py --json                          # one JSON object, and nothing else, on stdout
python benchmarks/peers.py --parts cost --shape 1.5b       # time and memory only, on a GPU
```

Two settings, with the same rows, tokens, steps and schedule for all peers:

- `world`: SFT on the embedded world. Each peer has its own learning rate: from the demo's, it is doubled or halved
  while the mean of knowledge and ability rises, on a seed that is not used for the figures. Then come the seeds of the
  figures.
- `cost`: time and memory of a step of a larger shape with random weights, as in `benchmarks/step.py`. The rounds are
  two cycles through BAdam's blocks, whose steps differ: the seconds of a step are means.

The same command resumes an interrupted run: the scores of a model are a file, and so is the cost. The cost is not
measured again for the same or fewer peers, and never overwritten by one of other settings or peers. Flags that begin
with `--sft.` hold for every model of the world, such as `--sft.max_steps 4`.
"""

import argparse
import contextlib
import gc
import json
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import step
import step_run
import torch
from datasets import disable_progress_bars
from peer_report import about, by_peer, figure, grids, write_results
from peer_trainers import PEERS, check_packages, make_trainer, optimizer_tensors
from peer_world import BASE, RATE_SEED, make_all, read_scores
from rich.console import Console
from trl import SFTTrainer

from hft_trl import HFTConfig, HFTError, exit_on_user_error
from hft_trl.experiments.paired_tests import check_tests
from hft_trl.experiments.runner import check_settings
from hft_trl.files import write_json
from hft_trl.report.tables import rich_table

# In the shape for a CPU, embedding and head hold 11 % as many weights as the layers.
SHAPES = {
    **step_run.SHAPES,
    "60m": {"hidden": 768, "intermediate": 2048, "layers": 8, "heads": 12, "vocab": 4096, "batch": 2, "length": 128},
}
PARTS = ("world", "cost")
COSTED = ("fft", "hft", "last_half", "lora", "badam")  # a cycle of badam_all has other blocks, hence other rounds
OWN = re.compile(r"--sft\.(method|seed|output_dir|learning_rate|save_\w+|disable_tqdm)(=.*)?")


@dataclass(frozen=True)
class Setting(step_run.Setting):
    """The steps of a peer. BAdam's blocks come in order, so that whole cycles hold each of them equally often."""

    def make_trainer(self, options: argparse.Namespace) -> SFTTrainer:
        badam = {"switch_block_every": options.switch_every, "switch_mode": "ascending"}
        return make_trainer(self.variant, HFTConfig(), badam, **step_run.start(self, options))

    def optimizer_tensors(self, trainer: SFTTrainer) -> list[torch.Tensor]:
        return optimizer_tensors(trainer)


def measure_cost(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """
    Seconds and bytes of a step of each peer, from the file of an earlier call where it has them.

    Raises:
        [`HFTError`]: If that file has other settings, or peers that are not asked for and would be lost.
    """
    path, names = output / "cost.json", ("device", "dtype", "switch_every", "blocks", "rounds", *SHAPES["60m"])
    said = {"peers": [peer for peer in options.peers if peer in COSTED], **{key: vars(options)[key] for key in names}}
    found = read_cost(output)
    before = found.get("options", {"peers": []})
    others = [f"{key} {before[key]}, now {said[key]}" for key in names if found and before[key] != said[key]]
    missing, lost = (set(a["peers"]) - set(b["peers"]) for a, b in ((said, before), (before, said)))
    if not said["peers"] or not (others or missing):
        return found
    if before["peers"] and (others or lost):  # peers take turns: all are measured together
        others += [f"the peers {' '.join(before['peers'])}, now {' '.join(said['peers'])}"] if missing and lost else []
        raise HFTError(
            f"{path} was measured with {'; '.join(others)}: ask for the same (of peers, also for more), use another "
            "output_dir, or leave the cost out with --parts world."
        )
    machine = about()
    gc.freeze()  # collecting all imported objects takes as long as a step
    settings = [Setting("sft", peer, False) for peer in said["peers"]]
    with tempfile.TemporaryDirectory() as options.folder:
        peaks = [step.peak(setting, options) for setting in settings]
        records = step.measure(settings, options)
    for row, peak in zip(records, peaks, strict=True):
        row["bytes"]["peak"] = peak
        row["mean_seconds"] = fmean(each["total"] for each in row["steps"]) if row["steps"] else None
    write_json(path, {"options": said, **machine, "records": records})
    return read_cost(output)


def read_cost(output: Path) -> dict[str, Any]:
    """The measured cost, empty if there is none."""
    path = output / "cost.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--seeds", type=int, default=5, help="models of each peer (5)")
    parser.add_argument("--output_dir", default="runs/peers", help="folder of scores, table and figure (runs/peers)")
    parser.add_argument("--workers", type=int, default=1, help="models made at a time, each on one thread (1)")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b" if cuda else "60m")
    for name in SHAPES["60m"]:
        parser.add_argument(f"--{name}", type=int, help="by default the shape's")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", help="of the shape's weights")
    parser.add_argument("--switch_every", type=int, default=2, help="steps of a block of BAdam in the cost (2)")
    parser.add_argument("--blocks", action="store_true", help="cost: one peer after the other, twice")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options, flags = parser.parse_known_args(argv)
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: it must be at least 1")
    if options.switch_every < 1:
        parser.error(f"--switch_every {options.switch_every}: it must be at least 1")
    if not 1 <= options.seeds < RATE_SEED:
        parser.error(
            f"--seeds {options.seeds}: it must be from 1 to {RATE_SEED - 1}, as seed {RATE_SEED} is kept apart"
        )
    for flag in flags:
        if flag.startswith("--") and (OWN.fullmatch(flag) or not flag.startswith("--sft.")):
            parser.error(f"{flag} is no flag of this script, or one in which the peers differ: drop it")
    for name, value in SHAPES[options.shape].items():
        setattr(options, name, vars(options)[name] or value)
    options.kv_heads = SHAPES[options.shape].get("kv_heads")
    options.optim, options.hft = "adamw_torch_fused", {}
    options.device = "cuda" if cuda else "cpu"
    cycle = options.layers * options.switch_every
    options.rounds, options.peak_steps = 2 * cycle, cycle
    return options, flags


def main(options: argparse.Namespace, flags: list[str]) -> None:
    output, progress = Path(options.output_dir), Console(stderr=True)
    check_packages(options.peers)
    check_tests()
    check_settings(output, flags, None, ("peft", "badam"))
    with contextlib.redirect_stdout(sys.stderr):
        cost = measure_cost(options, output) if "cost" in options.parts else read_cost(output)
        if "world" in options.parts:
            for name in make_all(options.peers, options.seeds, output, options.workers, flags):
                progress.print(f"{name} is scored")
    scores = read_scores(output)
    world = by_peer(scores)
    base = next((values for trial, values in scores.items() if trial.peer == BASE), None)
    tables = grids(world, base, cost)
    write_results(tables, cost, output)
    if base:
        figure(world, base).savefig(output / "retention.png", dpi=130, facecolor="white")
    if options.json:
        print(json.dumps({**about(), "base": base, "world": world, "cost": cost}, indent=2))
    else:
        Console(width=200).print(*map(rich_table, tables))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bars()
    with exit_on_user_error():
        main(*parse(sys.argv[1:]))
