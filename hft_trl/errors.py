"""The one exception for mistakes that a user can mend."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class HFTError(ValueError):
    """
    A mistake in what the user asked for: a setting, a data set, a model or a folder.

    The message is one line that names the thing, the value that was seen and the way to mend it. Recipes and the
    command line print it without a traceback and exit with code 2.
    """


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn an [`HFTError`] into one line on the standard error stream and exit code 2, without a traceback."""
    try:
        yield
    except HFTError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)


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
    except (ValueError, TypeError, KeyError, ImportError, OSError, RuntimeError) as error:
        raise HFTError(f"{what} can't be set up: {' '.join(str(error).split()) or repr(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, for an [`HFTError`] that quotes it."""
    return str(error).strip().partition("\n")[0]
