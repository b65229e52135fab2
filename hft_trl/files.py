"""Files that are written whole or not at all, and what a disk that refuses them means for the user."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any

from hft_trl.errors import HFTError

# What torch's and safetensors' writers say of a disk that is full. They hide the system's error behind types of their
# own.
WRITERS = ("PytorchStreamWriter", "inline_container", "Error while serializing", "SafetensorError")


# What systems say of a disk
DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST, errno.ENAMETOOLONG, errno.ESTALE, errno.ENXIO),
}


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """
    Write a file whole or not at all: whenever the process or the machine dies, the file is the old or the new one.

    Args:
        path (`str` or `Path`):
            The file. Its folder must exist. Half of a file can only be left at the same name with a dot before it,
            which the next call overwrites.

    Yields:
        `Path`: What to write instead; it takes the file's place at the end.

    Raises:
        `OSError`: If the folder can't be written. The file is then as it was.
    """
    path = Path(path)
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
    """Write a text file whole or not at all."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, **options: Any) -> None:
    """Write a JSON file whole or not at all. Further arguments are those of `json.dumps`."""
    write_text(path, json.dumps(content, indent=2, **options) + "\n")


def read_json(path: Path) -> Any:
    """
    Read a JSON file.

    Raises:
        `ValueError`: If it is no JSON, or nested too deeply.
        `OSError`: If it can't be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: Path, **types: type | UnionType) -> dict[str, Any]:
    """
    Read a JSON object, and check the types of those of its values that are needed.

    Args:
        path (`Path`):
            The file.
        types (`type` or `UnionType`):
            Type of each needed value, by its key.

    Raises:
        `ValueError`: If it is no such object.
        `OSError`: If it can't be read.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__} instead of an object")
    for key, expected in types.items():
        if key not in content:
            raise ValueError(f"it has no {key!r}")
        if not isinstance(content[key], expected):
            raise ValueError(f"its {key!r} is {content[key]!r:.80}")
    return content


def write_json_once(path: Path, content: Any) -> None:
    """Write a JSON file unless it is there with this content: what is made of a new file would be made anew."""
    try:
        if read_json(path) == content:
            return
    except (OSError, ValueError):
        pass
    write_json(path, content, ensure_ascii=False)


def flush(folder: Path) -> None:
    """Have every file in a folder, and in the folders in it, reach the disk before the call returns."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def resolved(path: str | Path) -> Path:
    """Resolve a path as far as its links lead somewhere. `Path.resolve` raises where they form a loop."""
    return Path(os.path.realpath(path))


def sync(path: Path) -> None:
    """Have a file, or a folder's list of files, reach the disk before the call returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't flush a folder
            raise
    finally:
        os.close(handle)


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """
    Turn a disk that is full, read-only or gone into an [`HFTError`]. Put it around whatever saves.

    Args:
        folder (`str` or `Path`):
            What is written, for the message.
    """
    try:
        yield
    except HFTError:
        raise
    except OSError as error:
        if error.errno not in DISK:  # the hub's and the network's errors are such errors too
            raise
        raise _refused(folder, error.strerror) from error
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if not any(word in text for word in WRITERS):
            raise
        # safetensors quotes the system's reason, torch drops it
        reason = str(error).split("I/O error: ")[-1] if "I/O error" in text else "a file was cut short"
        raise _refused(folder, reason) from error


def _refused(folder: str | Path, reason: str) -> HFTError:
    # os.path's function says no of a name that is too long, where Path's raises
    here = next(path for path in (Path(folder), *Path(folder).absolute().parents) if os.path.exists(path))  # noqa: PTH110
    return HFTError(
        f"{folder} can't be written ({reason}; {shutil.disk_usage(here).free / 1e6:,.1f} MB are free there): make "
        "room, or mend the folder's permissions, and run the same command again; it goes on from the last whole "
        "checkpoint."
    )
