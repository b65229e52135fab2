"""Keep the base's predictions on the prompts in a file, so that a resumed run compares with the same base."""

import hashlib
import json
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hft_trl.errors import HFTError
from hft_trl.files import replacing, writing
from hft_trl.processes import by_first_process
from hft_trl.retention.meter import LIKELIEST, Base, Meter

BASE_FILE = "retention_base.safetensors"


def write_base(path: Path, base: Base, meter: Meter) -> None:
    """Write the predictions completely or not at all, with a digest of the prompts. All processes must call it."""
    by_first_process(partial(_write, path, base, meter))


def read_base(path: Path, meter: Meter) -> Base:
    """Read the predictions. A missing file and one of other prompts are rejected. All processes must call it."""
    found = [by_first_process(partial(_read, path, meter))]
    broadcast_object_list(found)
    return found[0]


def fits(path: Path, meter: Meter) -> bool:
    """Return whether a file has predictions on the prompts."""
    try:
        _read(path, meter)
    except HFTError:
        return False
    return True


def _write(path: Path, base: Base, meter: Meter) -> None:
    tensors = {
        name: torch.cat(parts) for name, parts in zip(("ids", "log_probs"), zip(*base, strict=True), strict=True)
    }
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            save_file(tensors, new, metadata={"prompts": _digest(meter)})


def _read(path: Path, meter: Meter) -> Base:
    remedy = "restore it, start the run again, or leave prompts out"
    if not path.is_file():
        raise HFTError(f"{str(path)!r}, the base's predictions for retention/base_kl, does not exist: {remedy}.")
    try:
        with safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get("prompts")
            tensors = [file.get_tensor(name) for name in ("ids", "log_probs")]
    except (OSError, SafetensorError) as error:
        raise HFTError(f"{str(path)!r}, the base's predictions, cannot be read ({error}): {remedy}.") from error
    if digest != _digest(meter):
        raise HFTError(
            f"{str(path)!r} has the base's predictions on other prompts: give the prompts, max_rows and tokenizer "
            "that it was made with, or start the run again."
        )
    lengths = [len(ids) for ids in meter.prompts]
    return list(zip(*(tensor.split(lengths) for tensor in tensors), strict=True))


def _digest(meter: Meter) -> str:
    return hashlib.sha256(json.dumps([LIKELIEST, meter.prompts]).encode()).hexdigest()
