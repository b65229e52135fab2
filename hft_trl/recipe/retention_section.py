"""The section `retention` of a recipe: what is measured, checked before training and compared with the run's base."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import AutoModelForCausalLM

from hft_trl.backends.zero import whole_models
from hft_trl.checkpoints.whole import last_whole_checkpoint
from hft_trl.demo.probes import probe_rows
from hft_trl.errors import HFTError
from hft_trl.processes import by_first_process
from hft_trl.recipe.arguments import ModelArguments, RetentionArguments
from hft_trl.retention.callback import RetentionCallback
from hft_trl.retention.meter import BASE_FILE, Meter, fits, write_base
from hft_trl.skeleton import build_on_meta

if TYPE_CHECKING:
    from hft_trl.recipe import Stage

DEMO_EVERY = 60  # steps of the embedded model: a measurement takes as long as three of them


def retention_section(section: RetentionArguments, model: ModelArguments) -> RetentionArguments | None:
    """Return what to measure, `None` for nothing. Without files, only the embedded model has rows of its own."""
    if section.max_rows == 0:
        return None
    if any(section.files()) or model.model_name_or_path == "demo":
        return section
    if section != RetentionArguments():
        raise HFTError("retention has no texts, facts or prompts: give at least one file, or remove the section.")
    return None


def check_retention(first: "Stage") -> Meter | None:
    """Check the rows with the tokenizer and the length of the run's start model, which all stages share."""
    if first.retention is None:
        return None
    start, (rows, _) = first.model, _rows(first.retention)
    meter = Meter(first.load_tokenizer(), **rows)
    meter.check(build_on_meta(start.model_name_or_path, start.model_revision, start.trust_remote_code))
    return meter


def settle_base(stages: Sequence["Stage"], meter: Meter) -> None:
    """Compute the base's predictions for a run that began without them or with other prompts."""
    first, start = stages[0], stages[0].model
    begun = first.finished() or last_whole_checkpoint(first.folder) is not None
    if not begun or not meter.prompts or all(stage.finished() for stage in stages):
        return
    file = _base_file(first)
    found = [by_first_process(partial(fits, file, meter))]
    broadcast_object_list(found)
    if found[0]:
        return
    with whole_models():
        loading = {**first.args.model_init_kwargs, "trust_remote_code": start.trust_remote_code}
        model = AutoModelForCausalLM.from_pretrained(start.model_name_or_path, **loading)
    write_base(file, meter.base(model.to(PartialState().device)), meter)


def retention_callback(stage: "Stage") -> RetentionCallback:
    """Return the callback that measures a stage, in all stages against the run's base."""
    rows, every = _rows(stage.retention)
    later = stage.base is not None and rows["prompts"] is not None
    return RetentionCallback(**rows, every=every, base=_base_file(stage) if later else None)


def _rows(section: RetentionArguments) -> tuple[dict[str, Any], int | None]:
    """Return the rows to measure on, and the steps between measurements."""
    texts, facts, prompts = section.files()
    if any(section.files()):
        return {"texts": texts, "facts": facts, "prompts": prompts, "max_rows": section.max_rows}, section.every
    embedded = probe_rows("retention")
    columns = {f"{kind}s": [row[kind] for row in embedded] for kind in ("text", "fact", "prompt")}
    return {**columns, "max_rows": section.max_rows}, section.every or DEMO_EVERY


def _base_file(stage: "Stage") -> Path:
    return (stage.first_folder or stage.folder) / BASE_FILE
