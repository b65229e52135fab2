"""Lock the folder of a run until the process ends, however it ends."""

import errno
import fcntl
import os
import socket
from pathlib import Path

from hft_trl.errors import HFTError

LOCK_FILE = "_run.lock"

_held: dict[tuple[int, int], int] = {}  # descriptors that hold locks, by the lock file's device and inode


def lock(folder: Path) -> None:
    """Lock a folder, created if missing, against other runs. Locking it twice is no error."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, held in list(_held.items()):
        if os.fstat(held).st_nlink == 0:  # its folder was removed
            os.close(_held.pop(key))
    handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    file = os.fstat(handle)
    if (file.st_dev, file.st_ino) in _held:
        os.close(handle)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(handle, 100).decode(errors="replace") or "of unknown number"
        os.close(handle)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        raise HFTError(
            f"output_dir {str(folder)!r} is in use by process {holder}: wait for it, end it, or choose another one."
        ) from error
    os.truncate(handle, 0)
    os.write(handle, f"{os.getpid()} on {socket.gethostname()}".encode())
    _held[file.st_dev, file.st_ino] = handle


def _leave_to_parent() -> None:
    """Release the locks in a forked worker, which may outlive its parent."""
    while _held:
        os.close(_held.popitem()[1])


os.register_at_fork(after_in_child=_leave_to_parent)
