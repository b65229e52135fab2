"""A continual run as Markdown with its pictures, and several runs side by side; all from `scores.json`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hft_trl.continual.plots import curves_figure, matrix_figure
from hft_trl.continual.scores import SCORES_FILE, read_scores
from hft_trl.continual.tables import (
    comparison_grid,
    forgetting_grid,
    other_settings,
    run_name,
    score_grid,
    transfer,
)
from hft_trl.errors import HFTError
from hft_trl.files import resolved, write_text, writing
from hft_trl.report.figures import save_figure
from hft_trl.report.tables import table


def write_report(folder: str | Path) -> Path:
    """
    Write `report.md`, `matrix.png` and `curves.png` beside a run's `scores.json`, and return the first.

    Raises:
        [`HFTError`]: If there are no scores, or the folder can't be written.
    """
    folder = Path(folder)
    scores = _scores(folder)
    with writing(folder):
        for name, figure in (("matrix", matrix_figure(scores)), ("curves", curves_figure({run_name(scores): scores}))):
            save_figure(figure, folder / f"{name}.png")
        write_text(folder / "report.md", _markdown(scores))
    return folder / "report.md"


def _markdown(scores: dict[str, Any]) -> str:
    parts = [
        "# Continual learning report",
        f"{run_name(scores)}, from `{scores['model']}`. Every figure comes from `{SCORES_FILE}`.",
        f"OP {scores['op'][-1]:.1f}, BWT {transfer(scores)} after the last of {len(scores['rounds'])} rounds.",
        "## Scores",
        table(score_grid(scores)),
        "![Score on each task after each round](matrix.png)",
        "OP is the mean of a row; BWT is the sum of what earlier tasks lost (negative) or won since their own round, divided "
        "by the number of tasks seen.",
        "![Overall performance and backward transfer](curves.png)",
        "## Forgetting",
        table(forgetting_grid(scores)),
    ]
    if scores["probes"]:
        probes = (f"- {model}: {_listed(found)}" for model, found in scores["probes"].items())
        parts += ["## General abilities and knowledge", "\n".join(probes)]
    empty, cut = sum(scores["empty_predictions"][-1]), sum(scores["truncated_prompts"][-1])
    parts.append(
        f"At the end {empty} predictions were empty (they score 0), and {cut} prompts were cut from the left to fit."
    )
    return "\n\n".join(parts) + "\n"


def _listed(found: dict[str, float | None]) -> str:
    return ", ".join(
        f"{key.replace('_', ' ')} {'-' if value is None else f'{value:.1f}'}" for key, value in found.items()
    )


def compare(folders: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """
    The scores of runs that can be compared, by the name of the folder as it was given.

    Raises:
        [`HFTError`]: If a run has no scores yet, is not finished, was given twice, or had another base, other tasks or other
            test sets than the first.
    """
    folders = [str(folder) for folder in folders]
    places = [resolved(folder) for folder in folders]
    twice = next((folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise HFTError(f"{twice} is given twice: name each run once.")
    runs = {folder: _scores(Path(folder)) for folder in folders}
    first = next(iter(runs.items()))
    for name, scores in runs.items():
        if len(scores["matrix"][-1]) < len(scores["tasks"]):
            raise HFTError(
                f"{name} has {len(scores['matrix'])} rounds of {len(scores['tasks'])} tasks: finish it first."
            )
        for key in ("tasks", "metrics"):
            if scores[key] != first[1][key]:
                raise HFTError(
                    f"{name} has the {key} {', '.join(scores[key])}, {first[0]} has {', '.join(first[1][key])}: compare "
                    "runs of the same tasks in the same order."
                )
        if scores["model"] != first[1]["model"]:
            raise HFTError(
                f"{name} started from {scores['model']}, {first[0]} from {first[1]['model']}: compare runs of one base."
            )
        if scores["settings"].get("test_sets") != first[1]["settings"].get("test_sets"):
            raise HFTError(f"{name} has other test sets than {first[0]}: compare runs of one benchmark.")
    return runs


def write_comparison(runs: dict[str, dict[str, Any]], folder: str | Path) -> Path:
    """Write `comparison.md` and `comparison.png`, one table and one figure of runs, and return the first."""
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        labels = {f"{run_name(run)} ({name})": run for name, run in runs.items()}
        save_figure(curves_figure(labels), folder / "comparison.png")
        parts = ["# Continual runs side by side", table(comparison_grid(runs)), "![OP and BWT](comparison.png)"]
        if differences := other_settings(runs):
            parts += ["These runs differ in other settings too:", "\n".join(f"- {line}" for line in differences)]
        write_text(folder / "comparison.md", "\n\n".join(parts) + "\n")
    return folder / "comparison.md"


def _scores(folder: Path) -> dict[str, Any]:
    scores = read_scores(folder)
    if scores is None:
        raise HFTError(f"{folder} has no {SCORES_FILE}: give the folder of a continual run.")
    return scores
