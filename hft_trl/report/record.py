"""Save and load `report.json`, from which all tables and plots are made."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from pydantic import TypeAdapter, ValidationError

from hft_trl.errors import HFTError
from hft_trl.files import read_or_reject, write_json, writing
from hft_trl.redact import redact
from hft_trl.retention import PREFIX

REPORT_FILE = "report.json"
REPORT_VERSION = 1
HISTORY = "history"
MARGIN = "rewards/margins"
ONLY_KNOWN = {"extra": "forbid"}  # as pydantic reads the files


@dataclass
class UnitChange:
    """Store how far one unit (a matrix with its bias) moved in a stage."""

    __pydantic_config__: ClassVar = ONLY_KNOWN
    name: str
    layer: int | None
    category: str
    slot: str
    trainable: bool
    relative_change: float | None  # `||w - w_base|| / ||w_base||`, None if undefined
    relative_change_from_start: float | None = None  # the same for the model that the stage started from


@dataclass
class StageRecord:
    """Store the measurements of one stage."""

    __pydantic_config__: ClassVar = ONLY_KNOWN
    name: str
    method: str | None  # "hft" or "fft", None for an adapter
    selection_digest: str | None
    share: dict[str, float]  # of trained parameters in [0, 1], by category, "layers" and "model"
    trainable_params: int
    total_params: int
    steps: int
    tokens: int  # of all processes
    tokens_per_second: float | None  # of all processes
    runtime_seconds: float | None
    peak_memory_bytes: int | None  # of a process
    optimizer_state_bytes: int | None
    first_loss: float | None  # in the first log row
    last_loss: float | None
    frozen_unchanged: bool | None  # whether the frozen half is bit-identical, None without one
    start_model: str = ""
    dataset: str = ""
    rows: int | None = None
    dropped_rows: int | None = None  # without a trained token after truncation
    truncated_rows: int | None = None  # from the left, None if they were not counted
    batch_size: int | None = None  # rows of an optimizer step, of all processes
    learning_rate: float | None = None  # the peak
    resumed_from_step: int | None = None
    best_step: int | None = None  # of the saved model, if `load_best_model_at_end` chose it
    reference_memory_bytes: int | None = None  # per process, without parameters shared with the policy
    shared_reference_bytes: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # the trainer's log rows
    moved: list[UnitChange] = field(default_factory=list)


@dataclass
class Report:
    """Store all measurements of a run: the content of `report.json`."""

    __pydantic_config__: ClassVar = ONLY_KNOWN
    stages: list[StageRecord]  # in the order in which they ran
    evaluation: dict[str, dict[str, float | None]] = field(default_factory=dict)  # in percent by model, "base" first
    standard_errors: dict[str, dict[str, float | None]] = field(default_factory=dict)  # the known ones
    suites: dict[str, list[str]] = field(default_factory=dict)  # each one's scores in order; if empty, all are shown
    samples: list[dict[str, str]] = field(default_factory=list)  # a "prompt", and each model's answer by its name
    retention: dict[str, Any] = field(default_factory=dict)  # see `retention_of`
    base_model: str = ""  # hub id or folder of the first stage's start model
    command: list[str] = field(default_factory=list)  # with secrets hidden, as in the settings
    settings: dict[str, Any] = field(default_factory=dict)  # by section, or by stage and section
    num_processes: int = 1
    environment: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    version: int = REPORT_VERSION

    def __post_init__(self) -> None:
        self.command, self.settings = redact(self.command), redact(self.settings)

    def save(self, directory: str | Path) -> Path:
        """Write `report.json` atomically to a folder, created if missing. Numbers not finite become null."""
        path = Path(directory) / REPORT_FILE
        with writing(directory):
            finite = json.loads(json.dumps(asdict(self)), parse_constant=lambda _: None)
            write_json(path, finite, ensure_ascii=False)
        return path

    @classmethod
    def load(cls, directory: str | Path) -> "Report":
        """Read `report.json` from a run's folder. Reject a missing, invalid or differently versioned file."""
        path = Path(directory) / REPORT_FILE
        content = read_or_reject(path, "give the output folder of a run")
        found = content.get("version")
        if found != REPORT_VERSION:
            raise HFTError(f"{path} has version {found!r}, this hft_trl reads {REPORT_VERSION}: run the recipe again.")
        report = from_json(cls, content, f"{path}: report")
        row = dict[str, float | None]
        for name, figures in report.retention.items():
            from_json(dict[str, list[row]] if name == HISTORY else row, figures, f"{path}: report.retention.{name}")
        return report


def retention_of(stages: Sequence[StageRecord]) -> dict[str, Any]:
    """
    Collect what a run keeps of its base from the log rows of its stages, empty without a measurement.

    The keys are `"base"` and the stages, each with its last figures, and `"history"` with the rows of every stage.
    """
    history = {}
    for stage in stages:
        kept = [row for row in stage.history if any(key.startswith(PREFIX) for key in row)]
        if kept:
            history[stage.name] = [
                {key.removeprefix(PREFIX): row[key] for key in row if key == "step" or key.startswith(PREFIX)}
                for row in kept
            ]
    if not history:
        return {}
    first = history.get(stages[0].name, [{"step": None}])[0]
    last = {"base": first} if first["step"] == 0 else {}
    last |= {name: rows[-1] for name, rows in history.items()}
    timing = ("step", "seconds")
    figures = {name: {key: row[key] for key in row if key not in timing} for name, row in last.items()}
    return {**figures, HISTORY: history}


def from_json(hint: Any, value: Any, where: str) -> Any:
    """Convert a JSON value to its type hint, dataclasses included. An error names the first wrong place."""
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in first["loc"])
        found = "" if first["type"] == "missing" else f" ({first['input']!r:.80})"
        raise HFTError(f"{where}{place}{found}: {first['msg']}. Run the recipe again to write it.") from error
