"""Results of `benchmarks/peers.py` as tables, a figure and a page."""

import datetime
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import step
import torch
from peer_trainers import PEERS
from peer_world import BASE, RATE_SEED, Scores, best_rate

from hft_trl.environment import package_version
from hft_trl.experiments.paired_tests import compare, difference_cells, mean_cell
from hft_trl.redact import redact
from hft_trl.report import environment
from hft_trl.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY
from hft_trl.report.tables import Grid, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = dict(zip(PEERS, (ORANGE, BLUE, GREEN, PURPLE, SKY, RED), strict=True))


def about() -> dict[str, Any]:
    """The machine, its load over the last minute, versions and time."""
    versions = {name: package_version(name) for name in ("peft", "badam")}
    return {
        "machine": step.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "environment": {**environment(), **versions},
    }


def by_peer(scores: Scores) -> dict[str, dict[str, Any]]:
    """By peer: scores of its rates on the seed of the rates, the best rate, and scores of the other seeds."""
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
    """Tables of all peers, and of the differences between HFT and each of them, seed by seed."""
    rows, costs = [], {row["variant"]: row for row in cost.get("records", [])}
    if base:
        rows.append([BASE, "-", "1", f"{base['knowledge']:.1f}", f"{base['ability']:.1f}", *["-"] * 6])
    full = costs.get("fft", {}).get("mean_seconds")
    for peer in PEERS:
        if peer not in world and peer not in costs:
            continue
        found = world.get(peer, {"best_rate": None, "seeds": {}})
        seeds, row = list(found["seeds"].values()), costs.get(peer, {"bytes": {}})
        seconds, spread, sizes = row.get("mean_seconds"), row.get("seconds", {}).get("total"), row["bytes"]
        rows.append(
            [
                peer,
                f"{found['best_rate']:g}" if found["best_rate"] else "-",
                str(len(seeds) or "-"),
                *(mean_cell([values[score] for values in seeds]) for score in ("knowledge", "ability")),
                f"{seconds:.3f} ({spread['low']:.3f} to {spread['high']:.3f})" if seconds else "-",
                f"{seconds / full:.2f}" if seconds and full else "-",
                *(
                    f"{sizes[name] / 1e6:,.1f}" if sizes.get(name) else "-"
                    for name in ("peak", "optimizer", "gradient")
                ),
                f"{sizes['trained'] / sizes['weight']:.1%}" if sizes.get("weight") else "-",
            ]
        )
    names = ["peer", "rate", "seeds", "knowledge", "ability", "seconds of a step", "to FFT"]
    grid = Grid("Peers", [*names, "peak MB", "optimizer MB", "gradient MB", "trained at a time"], rows)
    scores, differences = {peer: found["seeds"] for peer, found in world.items()}, []
    for peer in scores.keys() - {"hft"} if "hft" in scores else ():
        for score in ("knowledge", "ability"):
            difference = compare(scores, "hft", peer, score)
            if difference is not None:
                differences.append([peer, score, *difference_cells(difference)])
    names = ["peer", "score", "mean", "95 % interval", "p", "HFT higher"]
    return [grid, *([Grid("HFT less the peer", names, sorted(differences))] if differences else [])]


def figure(world: Mapping[str, dict[str, Any]], base: Mapping[str, float]) -> "Figure":
    """Knowledge against ability: a point per peer with deviations, and a line through its rates on one seed."""
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
    """Write the tables as Markdown, with the machine and the versions."""
    now = about()
    versions = ", ".join(
        f"{name} {now['environment'][name]}" for name in ("torch", "transformers", "trl", "peft", "badam")
    )
    shape = ""
    for row in cost.get("records", [])[:1]:
        settings = [f"{key} {value}" for key, value in cost["options"].items() if key != "peers"]
        load = f"{cost['threads']} thread(s), load {cost['load']:.1f}"
        measured = ", ".join([cost["date"][:10], cost["machine"], load, row["measured"], *settings])
        shape = f"\nTime and memory: {measured}."
    compared = "".join(
        "\nHFT less the peer, seed by seed; p is from a two-sided paired t-test, not corrected for multiple "
        f"comparisons.\n\n{table(grid)}\n"
        for grid in tables[1:]
    )
    text = f"""# HFT and its peers

Made by `python benchmarks/peers.py {shlex.join(redact(sys.argv[1:]))}` until {now["date"][:10]} ({versions}). What the
columns are and how to read them: [peers.md](../peers.md). Scores in percent, mean (standard deviation) over the seeds;
rates were chosen on seed {RATE_SEED}. Seconds: mean (quartiles). MB: 10^6 bytes.
{shape}

{table(tables[0])}
{compared}
![Knowledge against ability, by peer](retention.png)
"""
    (output / "results.md").write_text(text, encoding="utf-8")
