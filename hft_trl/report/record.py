"""Save and load `report.json`, from which all tables and plots are made."""

import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from hft_trl.errors import HFTError
from hft_trl.files import read_json, write_json
from hft_trl.redact import redact

REPORT_FILE = "report.json"
REPORT_VERSION = 1
KEPT = "retention/"  # prefix of the figures of `RetentionCallback` in log rows
HISTORY = "history"

T = TypeVar("T")


@dataclass
class UnitChange:
    """
    Store how far one unit (a matrix with its bias) moved in a stage.

    `relative_change` is `||w - w_base|| / ||w_base||`, `None` if undefined. `relative_change_from_start` is the same
    for the model that the stage started from.
    """

    name: str
    layer: int | None
    category: str
    slot: str
    trainable: bool
    relative_change: float | None
    relative_change_from_start: float | None = None


@dataclass
class StageRecord:
    """Store the measurements of one stage."""

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
    resumed_from_step: int | None = None
    reference_memory_bytes: int | None = None  # per process, without parameters shared with the policy
    shared_reference_bytes: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # the trainer's log rows
    moved: list[UnitChange] = field(default_factory=list)


@dataclass
class Report:
    """
    Store all measurements of a run: the content of `report.json`.

    Args:
        stages (`list[StageRecord]`): The stages in the order in which they ran.
        evaluation (`dict[str, dict[str, float]]`, *optional*): Scores in percent by model, `"base"` first.
        standard_errors (`dict[str, dict[str, float]]`, *optional*): Known standard errors of the scores.
        retention (`dict[str, Any]`, *optional*): What the base and each stage keep, see [`retention_of`].
        suites (`dict[str, list[str]]`, *optional*): Names of each suite's scores in order. If empty, all are shown.
        base_model (`str`, *optional*): Hub id or folder of the first stage's start model.
        command (`list[str]`, *optional*): Command line of the run, with secrets hidden as in the settings.
        settings (`dict[str, Any]`, *optional*): Settings of the run by section, or by stage and section.
        num_processes (`int`, *optional*, defaults to 1): Number of processes of the run.
        environment (`dict[str, Any]`, *optional*): Versions and machine, see [`~hft_trl.report.environment`].
        created (`str`, *optional*): Time of creation (ISO 8601, UTC), defaults to now.
        version (`int`, *optional*): Version of the format.
    """

    stages: list[StageRecord]
    evaluation: dict[str, dict[str, float | None]] = field(default_factory=dict)
    standard_errors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    suites: dict[str, list[str]] = field(default_factory=dict)
    retention: dict[str, Any] = field(default_factory=dict)
    base_model: str = ""
    command: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    num_processes: int = 1
    environment: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    version: int = REPORT_VERSION

    def __post_init__(self) -> None:
        self.command, self.settings = redact(self.command), redact(self.settings)

    def save(self, directory: str | Path) -> Path:
        """Write `report.json` atomically to a folder, created if missing. Numbers not finite become null."""
        path = Path(directory) / REPORT_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, _finite(asdict(self)), ensure_ascii=False, allow_nan=False)
        except OSError as error:
            raise HFTError(f"{path} can't be written ({error.strerror}): choose another output folder.") from error
        return path

    @classmethod
    def load(cls, directory: str | Path) -> "Report":
        """Read `report.json` from a run's folder. Reject a missing, invalid or differently versioned file."""
        path = Path(directory) / REPORT_FILE
        try:
            content = read_json(path)
        except OSError as error:
            raise HFTError(f"{path} can't be read ({error.strerror}): give the output folder of a run.") from error
        except ValueError as error:
            raise HFTError(f"{path} is not valid JSON ({error}): run the recipe again.") from error
        found = content.get("version") if isinstance(content, dict) else None
        if found != REPORT_VERSION:
            raise HFTError(f"{path} has version {found!r}, this hft_trl reads {REPORT_VERSION}: run the recipe again.")
        report = _build(cls, content, str(path))
        for name in ("evaluation", "standard_errors"):
            for model, scores in content.get(name, {}).items():
                _check_numbers(scores, f"{path}: {name} = {{{model!r}: ...}}", optional=True)
        for name, figures in report.retention.items():
            rows = figures.values() if name == HISTORY and isinstance(figures, dict) else [[figures]]
            for row in (row for part in rows for row in (part if isinstance(part, list) else [part])):
                _check_numbers(row, f"{path}: retention = {{{name!r}: ...}}", optional=True)
        for name, words in {"command": report.command, **report.suites}.items():
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise HFTError(
                    f"{path} has {name} = {words!r:.80}, which is not a list of texts: run the recipe again."
                )
        report.stages = [
            stage_record(stage, f"{path}: stage {number}") for number, stage in enumerate(content["stages"])
        ]
        return report


def retention_of(stages: Sequence[StageRecord]) -> dict[str, Any]:
    """
    Collect what a run keeps of its base from the log rows of its stages, empty without a measurement.

    The keys are `"base"` and the stages, each with its last figures, and `"history"` with the rows of every stage.
    """
    found: dict[str, Any] = {}
    history = {}
    for number, stage in enumerate(stages):
        rows = [
            {"step": row["step"], **{key.removeprefix(KEPT): row[key] for key in row if key.startswith(KEPT)}}
            for row in stage.history
            if any(key.startswith(KEPT) for key in row)
        ]
        if not rows:
            continue
        if number == 0 and rows[0]["step"] == 0:
            found["base"] = _figures(rows[0])
        found[stage.name] = _figures(rows[-1])
        history[stage.name] = rows
    return {**found, HISTORY: history} if history else {}


def _figures(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key not in ("step", "seconds")}


def stage_record(content: Any, where: str) -> StageRecord:
    """Build the record of a stage from its JSON. Errors name the invalid field after `where`."""
    record = _build(StageRecord, content, where)
    _check_numbers(record.share, f"{where}: share")
    if not all(isinstance(row, dict) for row in record.history):
        raise HFTError(f"{where}: history has a row that is not a JSON object: run the recipe again.")
    record.moved = [_build(UnitChange, unit, f"{where}: moved") for unit in record.moved]
    return record


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def _build(cls: type[T], content: Any, where: str) -> T:
    """Build a dataclass from a JSON object with the same fields, without checking nested entries."""
    if not isinstance(content, dict):
        raise HFTError(f"{where} is {content!r:.80}, not a JSON object: run the recipe again.")
    known = {entry.name: entry for entry in fields(cls)}
    for name, value in content.items():
        if name not in known:
            raise HFTError(f"{where} holds the unknown field {name!r}: remove it, or run the recipe again.")
        hint = known[name].type
        kind = hint if isinstance(hint, UnionType) else get_origin(hint) or hint
        # JSON may write a whole float as an int. A bool is an int in Python, but not a number here.
        accepted = kind | int if float in get_args(hint) else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in (hint, *get_args(hint))):
            raise HFTError(
                f"{where} has {name} = {value!r:.80}, which is not of type {getattr(hint, '__name__', hint)}: "
                "run the recipe again."
            )
    for name, entry in known.items():
        if name not in content and entry.default is MISSING and entry.default_factory is MISSING:
            raise HFTError(f"{where} lacks the field {name!r}: run the recipe again to write it.")
    return cls(**content)


def _check_numbers(values: Any, where: str, optional: bool = False) -> None:
    if not isinstance(values, dict):
        raise HFTError(f"{where} is {values!r:.80}, not a JSON object: run the recipe again.")
    for name, value in values.items():
        if not (value is None and optional) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise HFTError(f"{where} has {name} = {value!r:.80}, which is not a number: run the recipe again.")
