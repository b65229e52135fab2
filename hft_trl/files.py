"""Files that are written completely or not at all, and disk errors as messages for the user."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import UnionType
from typing import Any

import yaml

from hft_trl.errors import HFTError

# Parts of messages of torch's and safetensors' writers, whose own error types hide the system's error
WRITERS = ("PytorchStreamWriter", "inline_container", "Error while serializing", "SafetensorError")
# System errors of a disk
DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST, errno.ENAMETOOLONG, errno.ESTALE, errno.ENXIO),
    errno.ELOOP,
}


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """
    Yield a temporary file that replaces `path` at the end, completely or not at all.

    A missing folder is created. A killed process can leave a partial file of this name with a leading dot, which the
    next call overwrites. An `OSError` leaves the old file unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all. Lone surrogates are written as escapes."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any, **options: Any) -> None:
    """Write a JSON file completely or not at all. Further arguments are those of `json.dumps`."""
    write_text(path, json.dumps(content, indent=2, **options) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Invalid or too deeply nested content raises a `ValueError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: Path, **types: type | UnionType) -> dict[str, Any]:
    """Read a JSON object. A missing or wrongly typed key of `types` raises a `ValueError`."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__} instead of an object")
    for key, expected in types.items():
        if key not in content:
            raise ValueError(f"it has no {key!r}")
        if not isinstance(content[key], expected):
            raise ValueError(f"its {key!r} is {content[key]!r:.80}")
    return content


def read_or_reject(path: Path, remedy: str, **types: type | UnionType) -> dict[str, Any]:
    """Read a JSON object as [`read_object`] does. One that cannot be read is a user error with a remedy."""
    try:
        return read_object(path, **types)
    except (OSError, ValueError) as error:
        raise HFTError(f"{path} cannot be read ({error}): {remedy}.") from error


def read_texts(path: Path, *keys: str) -> list[dict[str, Any]]:
    """Read a JSON list of objects with a text for each of `keys`. Reject the first invalid object."""
    try:
        content = read_json(path)
        json.dumps(content, ensure_ascii=False).encode()  # a lone surrogate is valid JSON, but no text
    except (OSError, ValueError) as error:
        raise HFTError(f"{str(path)!r} cannot be read as JSON: {getattr(error, 'strerror', error)}.") from error
    if not isinstance(content, list) or not content:
        raise HFTError(f"{str(path)!r} must be a JSON list of rows with {' and '.join(keys)}, and not empty.")
    for number, row in enumerate(content):
        for key in keys:
            text = row.get(key) if isinstance(row, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise HFTError(f"row {number} of {str(path)!r} has no text named {key!r}: {row!s:.80}.")
    return content


class _Loader(yaml.SafeLoader):
    """Reject a key that a mapping has twice: the first value would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if again := [name for name in names if names.count(name) > 1]:
            raise yaml.YAMLError(f"{again[0][1]} occurs twice, in line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of keys and values."""
    try:
        # As a file, of which errors quote no line: it may hold a secret
        with Path(path).expanduser().open(encoding="utf-8") as file:
            values = yaml.load(file, _Loader)
    # ValueError: undecodable bytes, impossible dates and numbers
    except (OSError, RecursionError, yaml.YAMLError, ValueError) as error:
        raise HFTError(f"config {str(path)!r} cannot be read as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise HFTError(f"config {str(path)!r} must hold keys and values.")
    return values


def write_json_once(path: Path, content: Any) -> None:
    """Write a JSON file unless it has this content, since a new file causes new work."""
    with suppress(OSError, ValueError):
        if read_json(path) == content:
            return
    write_json(path, content, ensure_ascii=False)


def flush(folder: Path) -> None:
    """Flush all files and folders in a folder to disk."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def resolved(path: str | Path) -> Path:
    """Resolve a path. Unlike `Path.resolve`, this does not raise if links form a loop."""
    return Path(os.path.realpath(path))


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of files, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(handle)


def is_missing(source: str) -> bool:
    """Return whether a name is a path that does not exist, and cannot be a hub id."""
    path = Path(source)
    longer = path.is_absolute() or source.startswith(".") or source.count("/") > 1
    return not path.exists() and (longer or ("/" in source and path.parent.is_dir()))


def check_output(flag: str, path: str | Path, is_file: bool = False) -> None:
    """Reject an output that cannot be written before the work for it begins. Nothing is left behind."""
    path = Path(path)
    folder = path.parent if is_file else path
    try:
        new = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            if is_file and path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        for place in new:
            place.rmdir()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        kind, reason = "file" if is_file else "folder", getattr(error, "strerror", None) or error
        raise HFTError(
            f"{flag} is {str(path)!r}, which cannot be written ({reason}): choose another {kind}."
        ) from error


@contextmanager
def writing(folder: str | Path, resumes: bool = True) -> Iterator[None]:
    """
    Raise an [`HFTError`] that names the folder if its disk is full, read-only or missing.

    `resumes` says that the same command resumes from a checkpoint.
    """
    try:
        yield
    except HFTError:
        raise
    except Exception as error:
        if isinstance(error, OSError):
            reason = error.strerror if error.errno in DISK else None  # hub and network errors are an `OSError` too
        elif any(word in f"{type(error).__name__}: {error}" for word in WRITERS):
            # safetensors quotes the system's reason, torch does not
            reason = str(error).split("I/O error: ")[-1] if "I/O error" in str(error) else "a file was cut short"
        else:
            reason = None
        if reason is None:
            raise
        # For a name that is too long, os.path.exists returns False, but Path.exists raises
        places = (Path(folder), *Path(folder).absolute().parents)
        here = next(path for path in places if os.path.exists(path))  # noqa: PTH110
        raise HFTError(
            f"{folder} cannot be written ({reason}; {shutil.disk_usage(here).free / 1e6:,.1f} MB are free there): "
            "make room, or change the folder's permissions, and run the same command again"
            f"{'; it resumes from the last complete checkpoint' if resumes else ''}."
        ) from error
