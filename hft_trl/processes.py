"""Agreement between processes: whether they see the same files and whether work succeeded."""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from hft_trl.errors import HFTError

Result = TypeVar("Result")


def all_see(file: Path | None) -> bool:
    """
    Whether all processes see the same file, on the same disk. All of them have to call it.

    The first process has to be able to write next to the file.
    """
    if len(set(gather_object([str(file)]))) > 1 or file is None:
        return False
    # Machines may have different files of one name, so a new file decides
    state, mark = PartialState(), [None]
    if state.is_main_process:
        with suppress(OSError):
            handle, name = tempfile.mkstemp(prefix="_seen-", dir=file.parent)
            os.close(handle)  # a network file system would keep a file that is removed while it is open
            mark = [name]
    broadcast_object_list(mark)
    seen = gather_object([mark[0] is not None and Path(mark[0]).exists()])
    if state.is_main_process and mark[0] is not None:
        Path(mark[0]).unlink()
    return all(seen)


def by_first_process(work: Callable[[], Result]) -> Result:
    """Run `work` in the first process, and return its result or raise its [`HFTError`] in every process."""
    outcome: list[Any] = [None, None]  # the result, and the message of an error
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except HFTError as error:
            outcome[1] = str(error)
    result, problem = broadcast_object_list(outcome)
    if problem is not None:
        raise HFTError(problem)
    return result
