"""
What several processes have to agree on:

whether they see the same files, and whether what one of them does went well.
"""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from hft_trl.errors import HFTError

Result = TypeVar("Result")


def speaks() -> bool:
    """Whether this process is the first, which warns for all. A `PartialState` would decide on devices."""
    return os.environ.get("RANK", "0") == "0"


def all_see(file: Path | None) -> bool:
    """
    Whether all processes mean the same file, on the same disk. Every process has to ask.

    Args:
        file (`Path`, *optional*):
            The file, or a folder, which the first process can write beside. `None` where there is none.
    """
    if len(set(gather_object([str(file)]))) > 1 or file is None:
        return False
    # Two machines may have files of one name, so a new one tells
    state, mark = PartialState(), [None]
    if state.is_main_process:
        with suppress(OSError):
            mark = [tempfile.mkstemp(prefix="_seen-", dir=file.parent)[1]]
    broadcast_object_list(mark)
    seen = gather_object([mark[0] is not None and Path(mark[0]).exists()])
    if state.is_main_process and mark[0] is not None:
        Path(mark[0]).unlink()
    return all(seen)


def by_first_process(work: Callable[[], Result]) -> Result | None:
    """
    Do something in the first process. Every process has to call, and none goes on before it is done.

    Args:
        work (`Callable`):
            What to do, without arguments.

    Returns:
        What `work` returned, in the first process; the others get `None`.

    Raises:
        [`HFTError`]: In every process what it was in the first, so that none waits for one that has ended.
    """
    problem: list[str | None] = [None]
    found = None
    if PartialState().is_main_process:
        try:
            found = work()
        except HFTError as error:
            problem = [str(error)]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise HFTError(problem[0])
    return found
