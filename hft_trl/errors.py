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


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, for an [`HFTError`] that quotes it."""
    return str(error).strip().partition("\n")[0]
