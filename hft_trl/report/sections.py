"""List the sections of a report, which `report.md` and `report.html` both show."""

import re
import shlex
from dataclasses import dataclass

import yaml

from hft_trl.demo import shown
from hft_trl.report.movement import movement_grids
from hft_trl.report.record import MARGIN, Report
from hft_trl.report.tables import NONE, Grid, evaluation_grids, retention_grid, sample_grid, share_grid, stage_grid

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
    "cell that stands for several matrices shows their mean.",
}


@dataclass(frozen=True)
class Block:
    """Store one piece of a section."""

    kind: str  # "heading", "text", "table", "picture" or "code"
    text: str = ""  # also the caption of a table, and the file name of a picture
    grid: Grid | None = None
    language: str = ""  # of code
    summary: str = ""  # under which code is folded


@dataclass(frozen=True)
class Section:
    """Store a section: its title, its anchor in the HTML page, and its blocks in order."""

    title: str
    anchor: str
    blocks: list[Block]


def sections(report: Report) -> list[Section]:
    """Return the sections of a report in order, without empty ones."""
    samples = [_table(sample_grid(report), "Greedy answers, cut after 64 tokens")] if report.samples else []
    moves = [_table(grid) for grid in movement_grids(report)]
    found = [
        Section("Kept and forgotten", "retention", _kept(report)),
        Section("Sample answers", "samples", samples),
        Section("Stages", "stages", _stages(report)),
        Section("Training", "training", _training(report)),
        Section("What moved", "moved", [Block("picture", "moved.png"), *moves] if moves else []),
        Section("Run it again", "rerun", _rerun(report)),
    ]
    return [section for section in found if section.blocks]


def launch_command(report: Report) -> str:
    """Return the run's command line for a shell. A script gets the launcher that starts it."""
    launcher = ["accelerate", "launch"] if report.command and report.command[0].endswith(".py") else []
    return shlex.join([*launcher, *report.command])


def _table(grid: Grid, caption: str = "") -> Block:
    return Block("table", caption or grid.title, grid)


def _kept(report: Report) -> list[Block]:
    blocks = []
    for name, grid in zip(report.suites or [""], evaluation_grids(report), strict=False):
        blocks += [*([Block("heading", name)] if name else []), _table(grid)]
    if blocks:
        blocks.append(Block("picture", "evaluation.png"))
    return blocks + ([_table(retention_grid(report.retention))] if report.retention else [])


def _stages(report: Report) -> list[Block]:
    origins = [
        [s.name, shown(s.start_model) or NONE, shown(s.dataset) or NONE, s.selection_digest or NONE]
        for s in report.stages
    ]
    origin_grid = Grid("Origins", ["stage", "started from", "data", "selection"], origins)
    return [_table(stage_grid(report), "The stages side by side"), _table(origin_grid), _table(share_grid(report))]


def _training(report: Report) -> list[Block]:
    logged = {key for stage in report.stages for row in stage.history for key in row if row[key] is not None}
    pictures = {"loss.png": "loss" in logged, "margins.png": MARGIN in logged, "retention.png": report.retention}
    return [Block("picture", name) for name, drawn in pictures.items() if drawn]


def _rerun(report: Report) -> list[Block]:
    blocks = []
    if report.command:
        note = (
            f"It ran in {report.num_processes} process{'es' if report.num_processes > 1 else ''}. Flags of accelerate "
            "launch itself, such as --config_file, are not part of it."
        )
        blocks += [Block("code", launch_command(report), language="sh"), Block("text", note)]
    if report.settings:
        dumped = yaml.safe_dump(report.settings, sort_keys=False, allow_unicode=True, width=100).rstrip("\n")
        dumped = re.sub(r"(?<=: )/\S+", lambda path: shown(path[0]), dumped)
        blocks.append(Block("code", dumped, language="yaml", summary="Settings"))
    if report.environment:
        rows = [[str(name), str(value)] for name, value in report.environment.items()]
        blocks.append(_table(Grid("Environment", ["", ""], rows)))
    return blocks
