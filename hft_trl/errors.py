"""How a program ends early: at a mistake that the user can mend, and at a SIGTERM."""

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

STOPPED = 128 + signal.SIGTERM  # 143, what a shell also reports of a process that SIGTERM ended outright
INTERRUPTED = 128 + signal.SIGINT  # 130, likewise
LATER = 10  # seconds, in which the launcher ends the other processes of a run whose first one has failed
PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends


class HFTError(ValueError):
    """
    A mistake in what the user asked for: a setting, a data set, a model or a folder.

    The message is one line that names the thing, the value that was seen and the way to mend it. Recipes and the
    command line print it without a traceback and exit with code 2.
    """


class Stopped(SystemExit):
    """
    The process was asked to end (SIGTERM) and has saved what it could. Left alone it ends the program with code 143.

    Args:
        message (`str`, *optional*, defaults to `""`):
            One line on what was saved and how to go on; empty in processes that have nothing to say.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(STOPPED)
        self.message = message


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """
    Turn an [`HFTError`] into one line on the standard error stream and exit code 2, without a traceback.

    A SIGTERM becomes one line and exit code 143, Ctrl-C one line and 130. Of several processes the first one speaks
    for all. While a trainer trains with `enable_jit_checkpoint`, it saves a checkpoint at a SIGTERM first.
    """
    main = threading.current_thread() is threading.main_thread()  # the only one that may handle signals
    before = signal.signal(signal.SIGTERM, _stop) if main else None
    _end_with_launcher()
    try:
        yield
    except HFTError as error:
        if os.environ.get("RANK", "0") != "0":  # what all processes say, the first says at once, which ends the others
            time.sleep(LATER)
        from hft_trl.redact import redact_text

        sys.stderr.write(f"error: {redact_text(' '.join(str(error).split()))}\n")
        sys.exit(2)
    except Stopped as stop:
        if stop.message:
            sys.stderr.write(f"stopped: {stop.message}\n")
        raise
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(
                "stopped: Ctrl-C; the same command resumes from the last whole checkpoint, if there is one.\n"
            )
        sys.exit(INTERRUPTED)
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _end_with_launcher() -> None:
    """`accelerate launch` of one process ends at a SIGTERM without passing it on, so the kernel is asked to."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    first = os.environ.get("RANK", "0") == "0"
    raise Stopped("SIGTERM came outside of training; the same command goes on from what is saved." if first else "")


# What libraries raise where a setting, a template or a file is wrong
MISTAKES = (ValueError, TypeError, KeyError, ImportError, OSError, RuntimeError, TemplateError)


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """
    Turn a library's refusal into an [`HFTError`]. Put it around calls whose arguments are the user's settings.

    Args:
        what (`str`):
            What was set up, for the message.
    """
    try:
        yield
    except HFTError:
        raise
    except MISTAKES as error:
        raise HFTError(f"{what} can't be set up: {explained(error)}") from error


def explained(error: BaseException) -> str:
    """The whole of a library's error message on one line, without a full stop at its end."""
    return " ".join(str(error).split()).rstrip(".") or repr(error)


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, for an [`HFTError`] that quotes it."""
    return str(error).strip().partition("\n")[0]
