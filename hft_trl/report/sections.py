"""List the sections of a report, which `report.md` and `report.html` both show."""

import shlex
from dataclasses import dataclass

import yaml

from hft_trl.demo import shown
from hft_trl.report.layer_map import layer_picture
from hft_trl.report.record import Report
from hft_trl.report.tables import NONE, Grid, evaluation_grid, movement_grids, retention_grid, share_grid, stage_grid

CAPTIONS = {
    "evaluation.png": "Scores of the base model and after each stage. One run with one seed: small differences are "
    "within what another seed would give.",
    "loss.png": "Training loss at each log row. Losses of different stages are different quantities (cross-entropy "
    "per token for SFT, preference loss per pair for DPO) and cannot be compared.",
    "margins.png": "Reward margin of the preference stage: beta times the log-probability ratio between policy and "
    "reference, chosen minus rejected, on training batches.",
    "retention.png": "What the model keeps of the base while it trains, over the steps of all stages: loss per token "
    "on general text, KL(base || model) per token on prompts, and the percentage of cloze facts that it knows.",
    "moved.png": "Distance from the base model, ||w - w_base|| / ||w_base||, after each stage. White: still exactly "
    "the base's weights. Hatched: frozen in this stage; a hatched cell with a colour was moved by an earlier stage. A "
    "cell or bar that stands for several matrices shows their mean.",
}


WIDTH = 100  # characters of the pictures of what learned


@dataclass(frozen=True)
class Block:
    """
    Store one piece of a section.

    `kind` is `"heading"`, `"text"`, `"table"`, `"picture"` or `"code"`. `text` is the caption of a table, or the file
    name of a picture.
    """

    kind: str
    text: str = ""
    grid: Grid | None = None
    language: str = ""


@dataclass(frozen=True)
class Section:
    """Store a section: its title, its anchor in the HTML page, and its blocks in order."""

    title: str
    anchor: str
    blocks: list[Block]


def sections(report: Report) -> list[Section]:
    """Return the sections of a report in order, without empty ones."""
    found = [
        Section("Kept and forgotten", "retention", [*_evaluation(report), *_retention(report)]),
        Section("Stages", "stages", _stages(report)),
        Section("Training", "training", _training(report)),
        Section("What moved", "moved", _movement(report)),
        Section("What learned", "selection", _selection(report)),
        Section("Run it again", "rerun", _rerun(report)),
    ]
    return [section for section in found if section.blocks]


def launch_command(report: Report) -> str:
    """Return the run's command line for a shell. A script gets the launcher that starts it."""
    launcher = ["accelerate", "launch"] if report.command and report.command[0].endswith(".py") else []
    return shlex.join([*launcher, *report.command])


def launch_note(report: Report) -> str:
    """Return the number of processes as text, which the command line does not contain."""
    number = f"{report.num_processes} process{'es' if report.num_processes > 1 else ''}"
    return (
        f"It ran in {number}. Flags of accelerate launch itself, such as --config_file and --num_processes, "
        "are not part of it."
    )


def _evaluation(report: Report) -> list[Block]:
    blocks = []
    for name, measures in report.suites.items() or [("", None)]:
        grid = evaluation_grid(report, measures)
        if grid.rows:
            blocks += [Block("heading", name)] if name else []
            blocks.append(Block("table", grid.title, grid))
    return [*blocks, Block("picture", "evaluation.png")] if blocks else []


def _retention(report: Report) -> list[Block]:
    grid = retention_grid(report)
    return [Block("table", grid.title, grid)] if grid.rows else []


def _stages(report: Report) -> list[Block]:
    origins = [
        [s.name, shown(s.start_model) or NONE, shown(s.dataset) or NONE, s.selection_digest or NONE]
        for s in report.stages
    ]
    shares = share_grid(report)
    return [
        Block("table", "The stages side by side", stage_grid(report)),
        Block("table", "Origins", Grid("Origins", ["stage", "started from", "data", "selection"], origins)),
        Block("table", shares.title, shares),
    ]


def _training(report: Report) -> list[Block]:
    logged = {key for stage in report.stages for row in stage.history for key in row if row[key] is not None}
    pictures = [("loss", "loss.png"), ("rewards/margins", "margins.png")]
    curves = [Block("picture", "retention.png")] if report.retention else []
    return [*(Block("picture", name) for key, name in pictures if key in logged), *curves]


def _movement(report: Report) -> list[Block]:
    grids = movement_grids(report)
    tables = [Block("table", f"{grid.title} (mean of ||w - w_base|| / ||w_base|| over units)", grid) for grid in grids]
    return [Block("picture", "moved.png"), *tables] if tables else []


def _selection(report: Report) -> list[Block]:
    blocks = []
    for stage in report.stages:
        if not stage.moved:
            continue
        title = f"{stage.name} ({stage.method.upper()})"
        inner = [unit.trainable for unit in stage.moved if unit.layer is not None]
        if inner and all(inner) and stage.share.get("layers", 1) < 1:
            # With masks, all matrices learn, but not all of their elements
            title += f": in the layers {stage.share['layers']:.0%} of the elements of each matrix"
        picture = layer_picture(stage.moved, lambda unit: unit.trainable, WIDTH)
        blocks += [Block("heading", title), Block("code", picture, language="text")]
    return blocks


def _rerun(report: Report) -> list[Block]:
    blocks = []
    if report.command:
        blocks += [Block("code", launch_command(report), language="sh"), Block("text", launch_note(report))]
    if report.settings:
        dumped = yaml.safe_dump(report.settings, sort_keys=False, allow_unicode=True, width=100).rstrip("\n")
        blocks += [Block("heading", "Settings"), Block("code", dumped, language="yaml")]
    if report.environment:
        names = Grid("", ["", ""], [[str(name), str(value)] for name, value in report.environment.items()])
        blocks.append(Block("table", "Environment", names))
    return blocks
