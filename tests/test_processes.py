"""What processes ask each other leaves nothing behind. That they agree is tested in `tests/processes`."""

import sys
from pathlib import Path

import pytest

from hft_trl.processes import all_see

OPEN = Path("/proc/self/fd")


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_asking_for_a_common_file_leaves_no_file_there_and_none_open(tmp_path):
    before = len(list(OPEN.iterdir()))
    assert all_see(tmp_path / "file")
    assert len(list(OPEN.iterdir())) == before
    assert not all_see(tmp_path / "none" / "file")
    assert not list(tmp_path.iterdir())
