"""What several processes have to agree on: whether they see the same files."""

import tempfile
from contextlib import suppress
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


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
