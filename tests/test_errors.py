"""How a program ends."""

import sys
import threading

import pytest

from hft_trl.errors import HFTError, exit_on_user_error


@pytest.mark.parametrize("error", [None, HFTError("a mistake")])
def test_one_of_several_processes_lets_waiting_threads_have_the_interpreters_lock_before_it_ends(monkeypatch, error):
    """A thread of gloo needs it to free the tensors of the last collective, and aborts a process that is ending."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    go, freed = threading.Event(), []
    thread = threading.Thread(target=lambda: (go.wait(), freed.append(True)))
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # the lock changes hands only where this thread waits
    try:
        with exit_on_user_error():
            go.set()
            if error is not None:
                raise error
    except SystemExit:
        pass
    finally:
        found = list(freed)
        sys.setswitchinterval(interval)
        thread.join()
    assert found
