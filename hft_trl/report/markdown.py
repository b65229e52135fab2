"""A report as Markdown: the tables, the pictures with captions, and what a rerun needs."""

import shlex
from collections.abc import Collection

import yaml

from hft_trl.demo import shown
from hft_trl.report.record import REPORT_FILE, Report, StageRecord
from hft_trl.report.tables import Grid, evaluation_grids, movement_grids, share_grid, stage_grid, table

CAPTIONS = {
    "evaluation.png": "Scores of the base model and after each stage. One run with one seed: small differences are "
    "within what another seed would give.",
    "loss.png": "Training loss at each log row. Losses of different stages are different quantities (cross-entropy "
    "per token for SFT, preference loss per pair for DPO) and can't be compared.",
    "margins.png": "Reward margin of the preference stage: beta times the log-probability ratio between policy and "
    "reference, chosen minus rejected, on training batches.",
    "moved.png": "Distance from the base model, ||w - w_base|| / ||w_base||, after each stage. White: still exactly "
    "the base's weights. Hatched: frozen in this stage; a hatched cell with a colour was moved by an earlier stage. A "
    "cell or bar that stands for several matrices shows their mean.",
}


def report_markdown(report: Report, pictures: Collection[str]) -> str:
    """
    Write a report down.

    Args:
        report ([`Report`]):
            The report.
        pictures (`Collection[str]`):
            Names of the pictures that lie beside the text.

    Returns:
        `str`: Markdown text.
    """
    methods = ", ".join(f"{stage.name} with {stage.method.upper()}" for stage in report.stages)
    parts = [
        "# Fine-tuning report",
        f"{methods or 'No stage'}, from `{shown(report.base_model) or 'an unnamed model'}`, {report.created}. "
        f"Every figure below comes from `{REPORT_FILE}`.",
    ]
    scores = evaluation_grids(report)
    if scores:
        parts += ["## Evaluation", scores[0].title + ".", *map(table, scores), *_picture("evaluation.png", pictures)]
    parts += ["## Stages", table(stage_grid(report))]
    parts.append("\n".join(_origin(stage) for stage in report.stages))
    parts += ["### Trained share by category", table(share_grid(report))]
    training = [*_picture("loss.png", pictures), *_picture("margins.png", pictures)]
    if training:
        parts += ["## Training", *training]
    movement = movement_grids(report)
    if movement:
        parts += ["## What moved", *_picture("moved.png", pictures)]
        for grid in movement:
            parts += [f"{grid.title} (mean of ||w - w_base|| / ||w_base|| over units):", table(grid)]
    parts += _rerun(report)
    return "\n\n".join(part for part in parts if part) + "\n"


def launch_command(report: Report) -> str:
    """The command line of the run, for a shell. A script is named with the launcher that starts it."""
    launcher = ["accelerate", "launch"] if report.command and report.command[0].endswith(".py") else []
    return shlex.join([*launcher, *report.command])


def launch_note(report: Report) -> str:
    """What the command line does not say, since the launcher keeps its own flags to itself."""
    number = f"{report.num_processes} process{'es' if report.num_processes > 1 else ''}"
    return f"It ran in {number}. Flags of accelerate launch itself, such as --config_file and --num_processes, are not part of it."


def _origin(stage: StageRecord) -> str:
    start = f" started from `{shown(stage.start_model)}`" if stage.start_model else ""
    data = f", data `{shown(stage.dataset)}`" if stage.dataset else ""
    digest = f", selection `{stage.selection_digest}`" if stage.selection_digest else ""
    return f"- `{stage.name}`{start}{data}{digest}"


def _rerun(report: Report) -> list[str]:
    parts = []
    if report.command:
        parts += ["## Command", _fenced(launch_command(report), "sh"), launch_note(report)]
    if report.settings:
        dumped = yaml.safe_dump(report.settings, sort_keys=False, allow_unicode=True, width=100).rstrip("\n")
        parts += ["## Settings", _fenced(dumped, "yaml")]
    if report.environment:
        names = Grid("", ["", ""], [[str(name), str(value)] for name, value in report.environment.items()])
        parts += ["## Environment", table(names)]
    return parts


def _fenced(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _picture(name: str, pictures: Collection[str]) -> list[str]:
    return [f"![{name.removesuffix('.png')}]({name})", f"*{CAPTIONS[name]}*"] if name in pictures else []
