"""How a program ends early, after a mistake of the user or a signal, and which process says so."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from jinja2 import TemplateError

STOPPED = 128 + signal.SIGTERM  # 143, as shells report after a SIGTERM
INTERRUPTED = 128 + signal.SIGINT  # 130, as shells report after Ctrl-C
LATER = 10  # seconds for the launcher to end the other processes after the first one failed
SETTLES = 0.1  # seconds for gloo's threads to free the tensors of the last collective
PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent ends


def speaks() -> bool:
    """Whether this process is the first, which warns for all. A `PartialState` would choose devices."""
    return os.environ.get("RANK", "0") == "0"


class HFTError(ValueError):
    """
    Raised for a mistake of the user in a setting, a data set, a model or a folder.

    The message is one line with the name, the value and the fix. Recipes and the command line print it without a
    traceback and exit with code 2.
    """


class Stopped(SystemExit):
    """Exit with code 143 after a SIGTERM. `message` says what is saved, empty in silent processes."""

    def __init__(self, message: str = "") -> None:
        super().__init__(STOPPED)
        self.message = message


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """
    Turn an [`HFTError`] into one line on standard error and exit code 2, without a traceback.

    A SIGTERM becomes one line and exit code 143, Ctrl-C one line and 130. Only the first process prints. A trainer
    with `enable_jit_checkpoint` saves a checkpoint first at a SIGTERM.
    """
    main = threading.current_thread() is threading.main_thread()  # only this thread may handle signals
    before = signal.signal(signal.SIGTERM, _stop) if main else None
    _end_with_launcher()
    try:
        yield
    except HFTError as error:
        if not speaks():  # the first process prints and ends the others meanwhile
            time.sleep(LATER)
        from hft_trl.redact import redact_text

        line = redact_text(" ".join(str(error).split()))
        # A damaged file can hold half of a surrogate pair, which a captured stream cannot encode
        sys.stderr.write(f"error: {line.encode('utf-8', 'backslashreplace').decode()}\n")
        sys.exit(2)
    except Stopped as stop:
        if stop.message:
            sys.stderr.write(f"stopped: {stop.message}\n")
        raise
    except KeyboardInterrupt:
        if speaks():
            sys.stderr.write(
                "stopped: Ctrl-C; the same command resumes from the last whole checkpoint, if there is one.\n"
            )
        sys.exit(INTERRUPTED)
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            # A thread that asks for the interpreter's lock later aborts the process (pytorch#190489)
            time.sleep(SETTLES)


def _end_with_launcher() -> None:
    """Ask Linux for a SIGTERM when the parent ends: `accelerate launch` does not forward its own."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped("SIGTERM came outside of training; the same command resumes from what is saved." if speaks() else "")


# What libraries raise for a wrong setting, template or file
MISTAKES = (ValueError, TypeError, KeyError, ImportError, OSError, RuntimeError, TemplateError)


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turn a library's error into an [`HFTError`] that names `what` is set up with the user's settings."""
    try:
        yield
    except HFTError:
        raise
    except MISTAKES as error:
        raise HFTError(f"{what} cannot be set up: {explained(error)}") from error


def explained(error: BaseException) -> str:
    """Return a library's complete error message on one line, without a full stop."""
    return " ".join(str(error).split()).rstrip(".") or repr(error)


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message, for an [`HFTError`] that quotes it."""
    return str(error).strip().partition("\n")[0].rstrip(".")
