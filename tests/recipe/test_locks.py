"""
A folder is locked until the process that writes into it ends, however it ends, and whatever else it does with the
files.
"""

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from hft_trl.errors import HFTError
from hft_trl.files import flush
from hft_trl.recipe.folder import LOCK_FILE, lock

FORK = get_context("fork")


def by_another_process(folder) -> str:
    """The error that another process gets when it takes the lock, empty if it gets the lock."""
    found = FORK.SimpleQueue()

    def attempt():
        try:
            lock(folder)
            found.put("")
        except HFTError as error:
            found.put(str(error))

    other = FORK.Process(target=attempt)
    other.start()
    text = found.get()
    other.join()
    other.close()
    return text


def test_the_lock_survives_whatever_the_process_does_with_the_folders_files(tmp_path):
    """Closing any descriptor of a file drops the locks of `lockf`: of a flush, of a copy, of a look into the file."""
    lock(tmp_path)
    flush(tmp_path)
    (tmp_path / LOCK_FILE).read_text()
    lock(tmp_path)
    assert f"in use by process {os.getpid()} on " in by_another_process(tmp_path)


def test_a_folder_of_another_process_is_refused_and_free_after_a_kill_though_its_workers_live(tmp_path):
    """As a data loader's worker does, the child outlives its parent for some time."""
    pids = FORK.SimpleQueue()

    def hold():
        lock(tmp_path)
        child = os.fork()
        if child != 0:
            pids.put(child)
        time.sleep(600)

    parent = FORK.Process(target=hold)
    parent.start()
    child = pids.get()
    with pytest.raises(HFTError, match=f"in use by process {parent.pid} on "):
        lock(tmp_path)
    parent.kill()
    parent.join()
    try:
        os.kill(child, 0)  # it lives
        lock(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
    assert (tmp_path / LOCK_FILE).read_text().startswith(f"{os.getpid()} on ")


def test_a_folder_that_was_removed_is_locked_again_when_it_is_made_again(tmp_path):
    folder, count = tmp_path / "run", len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        lock(folder)
        assert "in use" in by_another_process(folder)
        (folder / LOCK_FILE).unlink()
        folder.rmdir()
    assert len(list(Path("/proc/self/fd").iterdir())) <= count + 1


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("hft_trl.recipe.folder.fcntl.flock", refuse)
    lock(tmp_path)
    assert not (tmp_path / LOCK_FILE).read_text()
