"""
HFT against what else could be done: full fine-tuning, LoRA, freezing the last half of the layers, and BAdam.

```bash
pip install -c constraints.txt -e ".[eval,peers]"          # scipy, peft and badam
python benchmarks/peers.py --output_dir docs/peers         # everything, on a CPU
python benchmarks/peers.py --json                          # one JSON object, and nothing else, on stdout
python benchmarks/peers.py --parts cost --shape 1.5b       # time and memory only, on a GPU
```

Two settings, with the same rows, tokens, steps and schedule for all peers:

- `world`: SFT on the embedded world. Each peer has a learning rate of its own: from the demo's, it is doubled or halved for
  as long as the mean of knowledge and ability rises, on a seed that is kept apart. Then come the seeds of the figures.
- `cost`: time and memory of a step of a larger shape with random weights, as `benchmarks/step.py` measures them. The rounds
  are two cycles through BAdam's blocks, whose steps differ: the seconds of a step are means.

The same command goes on where it was interrupted: a model's scores are a file, and so is what was measured of the cost. Flags
that begin with `--sft.` hold for every model of the world, such as `--sft.max_steps 4`.
"""

import argparse
import contextlib
import datetime
import gc
import json
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import step
import torch
from datasets import disable_progress_bars
from peer_trainers import PEERS, check_packages, make_trainer, optimizer_tensors
from peer_world import BASE, RATE_SEED, Scores, best_rate, make_all, read_scores
from rich.console import Console
from trl import SFTTrainer

from hft_trl import HFTConfig, exit_on_user_error
from hft_trl.demo.trials import settle_settings
from hft_trl.demo.verdicts import check_tests, compare, difference_cells, mean_cell
from hft_trl.files import write_json
from hft_trl.report import environment
from hft_trl.report.machine import package_version
from hft_trl.report.markdown import table
from hft_trl.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY
from hft_trl.report.tables import Grid, rich_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The embedding and the head hold a tenth as many weights as the layers.
SHAPES = {
    **step.SHAPES,
    "60m": {"hidden": 768, "intermediate": 2048, "layers": 8, "heads": 12, "vocab": 4096, "batch": 2, "length": 128},
}
PARTS = ("world", "cost")
COSTED = ("fft", "hft", "last_half", "lora", "badam")  # a cycle of badam_all has other blocks, hence other rounds
COLOURS = dict(zip(PEERS, (ORANGE, BLUE, GREEN, PURPLE, SKY, RED), strict=True))
OWN = re.compile(r"--sft\.(method|seed|output_dir|learning_rate|save_\w+|disable_tqdm)(=.*)?")


@dataclass(frozen=True)
class Setting(step.Setting):
    """A peer's column of steps. BAdam's blocks come in order, so that rounds of whole cycles hold all of them alike."""

    def make_trainer(self, options: argparse.Namespace) -> SFTTrainer:
        badam = {"switch_block_every": options.switch_every, "switch_mode": "ascending"}
        return make_trainer(self.variant, HFTConfig(), badam, **step.start(self, options))

    def optimizer_tensors(self, trainer: SFTTrainer) -> list[torch.Tensor]:
        return optimizer_tensors(trainer)


def measure_cost(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Seconds and bytes of a step of each peer, from the file of an earlier call with the same options where there is one."""
    path, names = output / "cost.json", ("device", "dtype", "switch_every", "blocks", "rounds", *SHAPES["60m"])
    said = {"peers": [peer for peer in options.peers if peer in COSTED], **{key: vars(options)[key] for key in names}}
    found = read_cost(output)
    if found.get("options") == said:
        return found
    gc.freeze()  # to look through all that is imported takes as long as a step
    settings = [Setting("sft", peer, False) for peer in said["peers"]]
    with tempfile.TemporaryDirectory() as options.folder:
        peaks = [step.peak(setting, options) for setting in settings]
        records = step.measure(settings, options)
    for row, peak in zip(records, peaks, strict=True):
        row["bytes"]["peak"] = peak
        row["mean_seconds"] = fmean(each["total"] for each in row["steps"]) if row["steps"] else None
    write_json(path, {"options": said, **about(), "records": records})
    return read_cost(output)


def read_cost(output: Path) -> dict[str, Any]:
    """What was measured of the cost, nothing if nothing was."""
    path = output / "cost.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def about() -> dict[str, Any]:
    """The machine, the versions and the time."""
    versions = {name: package_version(name) for name in ("peft", "badam")}
    return {
        "machine": step.machine(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "environment": {**environment(), **versions},
    }


def by_peer(scores: Scores) -> dict[str, dict[str, Any]]:
    """For each peer that was tried: the scores of its rates on the seed kept apart, the best rate, and the seeds' scores."""
    found = {}
    for peer in [name for name in PEERS if any(trial.peer == name for trial in scores)]:
        best = best_rate(peer, scores)
        own = sorted((trial, values) for trial, values in scores.items() if trial.peer == peer)
        found[peer] = {
            "rates": {trial.rate: values for trial, values in own if trial.seed == RATE_SEED},
            "best_rate": best,
            "seeds": {t.seed: values for t, values in own if t.rate == best and t.seed != RATE_SEED},
        }
    return found


def grids(world: Mapping[str, dict[str, Any]], base: Mapping[str, float] | None, cost: dict[str, Any]) -> list[Grid]:
    """All peers side by side; then what HFT has more of than each, seed by seed."""
    rows, costs = [], {row["variant"]: row for row in cost.get("records", [])}
    if base:
        rows.append([BASE, "-", "-", "1", f"{base['knowledge']:.1f}", f"{base['ability']:.1f}", *["-"] * 6])
    full = costs.get("fft", {}).get("mean_seconds")
    for peer, learns in PEERS.items():
        if peer not in world and peer not in costs:
            continue
        found = world.get(peer, {"best_rate": None, "seeds": {}})
        seeds, row = list(found["seeds"].values()), costs.get(peer, {"bytes": {}})
        seconds, spread, sizes = row.get("mean_seconds"), row.get("seconds", {}).get("total"), row["bytes"]
        rows.append(
            [
                peer,
                learns,
                f"{found['best_rate']:g}" if found["best_rate"] else "-",
                str(len(seeds) or "-"),
                *(mean_cell([values[score] for values in seeds]) for score in ("knowledge", "ability")),
                f"{seconds:.3f} ({spread['low']:.3f} to {spread['high']:.3f})" if seconds else "-",
                f"{seconds / full:.2f}" if seconds and full else "-",
                *(
                    f"{sizes[name] / 1e6:,.0f}" if sizes.get(name) else "-"
                    for name in ("peak", "optimizer", "gradient")
                ),
                f"{sizes['trained'] / sizes['weight']:.1%}" if sizes.get("weight") else "-",
            ]
        )
    names = ["peer", "learns", "rate", "seeds", "knowledge", "ability", "seconds of a step", "to FFT"]
    grid = Grid("Peers", [*names, "peak MB", "optimizer MB", "gradient MB", "trained at a time"], rows)
    scores, differences = {peer: found["seeds"] for peer, found in world.items()}, []
    for peer in scores.keys() - {"hft"} if "hft" in scores else ():
        for score in ("knowledge", "ability"):
            difference = compare(scores, "hft", peer, score)
            if difference is not None:
                differences.append([peer, score, *difference_cells(difference)])
    names = ["peer", "score", "mean", "95 % interval", "p", "HFT higher"]
    return [grid, Grid("HFT less the peer", names, sorted(differences))]


def figure(world: Mapping[str, dict[str, Any]], base: Mapping[str, float]) -> "Figure":
    """Retention against ability: a point a peer with its deviations, and a line through its learning rates on one seed."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7.2, 5.2), layout="constrained")
    axes = drawing.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.plot(base["ability"], base["knowledge"], "*", color=GREY, markersize=14, label="base")
    for peer, found in world.items():
        rates = [found["rates"][rate] for rate in sorted(found["rates"])]
        colour, seeds = COLOURS[peer], list(found["seeds"].values())
        line = [[values[score] for values in rates] for score in ("ability", "knowledge")]
        axes.plot(*line, "o-", color=colour, alpha=0.35, linewidth=1, markersize=3)
        if not seeds:
            continue
        columns = [[values[score] for values in seeds] for score in ("ability", "knowledge")]
        spreads = [stdev(values) if len(values) > 1 else 0 for values in columns]
        label = f"{peer} at {found['best_rate']:g}"
        axes.errorbar(
            *map(fmean, columns), yerr=spreads[1], xerr=spreads[0], fmt="o", color=colour, capsize=3, label=label
        )
    axes.set_xlabel("ability (percent)")
    axes.set_ylabel("knowledge of the base that is left (percent)")
    axes.legend(frameon=False)
    return drawing


def write_results(tables: Sequence[Grid], cost: dict[str, Any], output: Path) -> None:
    """Write the tables as Markdown, with what they were measured on."""
    now = about()
    versions = ", ".join(
        f"{name} {now['environment'][name]}" for name in ("torch", "transformers", "trl", "peft", "badam")
    )
    shape = "".join(
        f"\nTime and memory: {cost['date'][:10]}, {cost['machine']}, {cost['threads']} thread(s), {row['measured']}, "
        + ", ".join(f"{key} {value}" for key, value in cost["options"].items() if key != "peers")
        + "."
        for row in cost.get("records", [])[:1]
    )
    text = f"""# HFT and its peers

Made by `python benchmarks/peers.py {shlex.join(sys.argv[1:])}` until {now["date"][:10]} ({versions}). What the
columns are and what to think of them: [peers.md](../peers.md). Scores in percent, mean (standard deviation) over the seeds;
rates were chosen on seed {RATE_SEED}. Seconds: mean (quartiles). MB: 10^6 bytes.
{shape}

{table(tables[0])}

Seed by seed; p is that of a two-sided paired t-test, not corrected for the number of comparisons.

{table(tables[1])}

![Knowledge against ability, by peer](retention.png)
"""
    (output / "results.md").write_text(text, encoding="utf-8")


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
    if not 1 <= options.seeds < RATE_SEED:
        parser.error(
            f"--seeds {options.seeds}: it must be from 1 to {RATE_SEED - 1}, as seed {RATE_SEED} is kept apart"
        )
    for flag in flags:
        if flag.startswith("--") and (OWN.fullmatch(flag) or not flag.startswith("--sft.")):
            parser.error(f"{flag} is no flag of this script, or not the same for all peers: drop it")
    for name, value in SHAPES[options.shape].items():
        setattr(options, name, vars(options)[name] or value)
    options.device = "cuda" if cuda else "cpu"
    cycle = options.layers * options.switch_every
    options.rounds, options.peak_steps = 2 * cycle, cycle
    return options, flags


def main(options: argparse.Namespace, flags: list[str]) -> None:
    output, progress = Path(options.output_dir), Console(stderr=True)
    check_packages(options.peers)
    check_tests()
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bars()
    settle_settings(output, flags, None, ("peft", "badam"))
    with contextlib.redirect_stdout(sys.stderr):
        cost = measure_cost(options, output) if "cost" in options.parts else read_cost(output)
        if "world" in options.parts:
            for trial in make_all(options.peers, options.seeds, output, options.workers, flags):
                progress.print(f"{trial.name} is scored")
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
    with exit_on_user_error():
        main(*parse(sys.argv[1:]))
