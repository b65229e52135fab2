"""Digests of saved models, data files and templates. They are equal exactly if the contents are equal."""

import dataclasses
import glob
import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.utils import CONFIG_NAME
from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from hft_trl.errors import HFTError
from hft_trl.files import resolved
from hft_trl.saved_models.saved_model import FILES
from hft_trl.weights import combined_digest, fingerprints, tensors, weight_files


def model_digest(folder: Path) -> str:
    """Return the SHA-256 (hex) of weights, configs and tokenizer, independent of sharding."""
    return combined_digest(_tensor_digests(folder) | _file_digests(folder))


def start_model(name: str, revision: str) -> dict[str, str | None]:
    """
    Return the identity of a stage's start model, from a folder or a hub id.

    A folder gives digests of its `weights` and other `files`, `None` if it is not trained yet. A hub id gives its
    `model_revision`, which is the commit if the local cache knows it.
    """
    folder = Path(name)
    if not folder.is_dir():
        commit = revision
        with suppress(HFValidationError):  # a folder that does not exist yet
            if isinstance(config := try_to_load_from_cache(name, CONFIG_NAME, revision=revision), str):
                commit = Path(config).parent.name
        return {"model_revision": commit, "weights": None, "files": None}
    try:
        weights = combined_digest(_tensor_digests(folder))
    except HFTError:  # not trained yet
        return {"weights": None, "files": None}
    return {"weights": weights, "files": combined_digest(_file_digests(folder))}


def named_files(settings: Mapping[str, Any]) -> dict[str, str | None]:
    """Return names of files and tokenizers in settings, and their SHA-256 as `NAME_content`."""
    found = {}
    for key, value in settings.items():
        if not isinstance(value, str) or not value:
            continue
        # For a text that is too long to be a path, os.path.isfile returns False, but Path.is_file raises
        if Path(value).suffix and os.path.isfile(value):  # noqa: PTH113
            found |= {key: Path(value).name, f"{key}_content": content_digest(Path(value))}
        elif os.path.isfile(f"{value}/tokenizer_config.json"):  # noqa: PTH113
            found |= {key: resolved(value).name, f"{key}_content": combined_digest(_file_digests(Path(value)))}
    return found


def mixture_parts(mixture: DatasetMixtureConfig) -> dict[str, Any]:
    """Return TRL's mixture as plain JSON, with a digest of each part's local files as `content`."""
    parts = [{**dataclasses.asdict(part), "content": _part_digest(part)} for part in mixture.datasets]
    for part in parts:
        if Path(part["path"]).is_dir():
            part["path"] = resolved(part["path"]).name  # wherever it lies, as for `named_files`
        if part["content"] is not None:
            part |= {key: _names(part[key]) for key in ("data_dir", "data_files")}
    return {"datasets": parts, "test_split_size": mixture.test_split_size}


def _names(files: Any) -> Any:
    """Return the names of local files or patterns without their folders, in the form that they are given."""
    if isinstance(files, dict):
        return {split: _names(value) for split, value in files.items()}
    if isinstance(files, list):
        return [_names(value) for value in files]
    return files if files is None or "://" in files else Path(files).name


def part_files(part: DatasetConfig) -> list[Path]:
    """Resolve patterns as datasets does, relative to a folder `path` or the working directory."""
    folder = part.path if Path(part.path).is_dir() else ""
    base = Path(folder, part.data_dir or "").expanduser()
    if part.data_files is None:
        return [base] if folder or part.data_dir else []
    patterns = list(part.data_files.values()) if isinstance(part.data_files, dict) else [part.data_files]
    names = [name for entry in patterns for name in ([entry] if isinstance(entry, str) else entry)]
    local = [str(base / name) for name in names if "://" not in name]  # Path.glob rejects absolute patterns
    return [Path(path) for pattern in local for path in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207


def _part_digest(part: DatasetConfig) -> str | None:
    files = part_files(part)
    if part.data_files is None:
        return content_digest(files[0]) if files else None
    digests = {str(place): content_digest(path) for place, path in enumerate(files)}
    return combined_digest(digests) if digests else None


def _file_digests(folder: Path) -> dict[str, str]:
    # A pattern may match a folder
    files = {path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}
    return {f"file {path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _tensor_digests(folder: Path) -> dict[str, str]:
    files = weight_files(str(folder))
    # A process does not read a file again whose inode, size and time of the last change are as before
    states = [path.stat() for path in sorted(set(files.values()))]
    return _read_tensors(tuple(files.items()), tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in states))


@cache
def _read_tensors(files: tuple[tuple[str, Path], ...], _states: tuple[tuple[int, int, int], ...]) -> dict[str, str]:
    return fingerprints(tensors(dict(files), dict(files)))


def content_digest(source: Path) -> str | None:
    """Return the SHA-256 (hex) of the names and bytes of a file or folder, or `None` if it does not exist."""
    source = Path(os.path.expanduser(source))  # noqa: PTH111 - Path's raises for an unknown user
    root, files = (source.parent, [source]) if source.is_file() else (source, source.rglob("*"))
    digests = {}
    for path in files:
        if path.is_file():
            with path.open("rb") as file:
                digests[str(path.relative_to(root))] = hashlib.file_digest(file, "sha256").hexdigest()
    return combined_digest(digests) if digests else None
