"""The models to evaluate: where they lie, and what tells one from another."""

from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download

from hft_trl import demo
from hft_trl.errors import HFTError, first_line
from hft_trl.saved_models.saved_model import FILES

WEIGHTS = "model*.safetensors*"  # some repositories hold a second copy, named consolidated


def find_models(names: Iterable[str], base: str | None = None) -> dict[str, Path]:
    """
    Find models on disk; those of the hub are downloaded.

    Args:
        names (`Iterable[str]`):
            Folders, hub ids (`"id@revision"` for a branch, tag or commit), or `"demo"` for the embedded model.
        base (`str`, *optional*):
            The model to compare with, named in the same way. By default the first of `names`.

    Returns:
        `dict[str, Path]`: Folder of each model by name, the base first.

    Raises:
        [`HFTError`]: If there is no such model.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    with state.local_main_process_first():  # so that only one process downloads
        return {name: _find(name) for name in dict.fromkeys([*([base] if base else []), *names])}


def _find(name: str) -> Path:
    folder = Path(demo.model_path(name))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise HFTError(f"{name!r} holds no config.json: give the folder of a saved model.")
        return folder
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=[WEIGHTS, *FILES]))
    except (OSError, ValueError, RuntimeError) as error:
        raise HFTError(f"{name!r} is neither a folder nor a model that the hub gave: {first_line(error)}") from error
