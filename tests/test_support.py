"""The pages that name tests are right about them: each test exists, and is collected."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUPPORT = (ROOT / "docs/support.md").read_text(encoding="utf-8")
PAGES = {"support": SUPPORT, "from": (ROOT / "docs/from.md").read_text(encoding="utf-8")}
NAMED = {page: re.findall(r"`(tests/[^`]+::[^`]+)`", text) for page, text in PAGES.items()}
ROWS = [line.strip("| ").split(" | ") for line in SUPPORT.splitlines() if line.startswith("| ")]
CELLS = [cell for _, *cells in ROWS for cell in cells if cells != ROWS[0][1:]]


class Collector:
    """Keeps what pytest collects."""

    def pytest_collection_finish(self, session):
        self.found = {item.nodeid for item in session.items}


@pytest.fixture(scope="module")
def collected():
    """The tests of all files that the pages name, those of a GPU and of DeepSpeed too."""
    files = sorted({name.partition("::")[0] for names in NAMED.values() for name in names})
    collector = Collector()
    flags = ["--collect-only", "-qq", "-m", "", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    assert pytest.main([*flags, *(str(ROOT / file) for file in files)], plugins=[collector]) == 0
    return collector.found | {name.partition("[")[0] for name in collector.found}


@pytest.mark.parametrize("page", NAMED)
def test_every_test_that_a_page_names_is_collected(collected, page):
    assert NAMED[page]
    assert [name for name in NAMED[page] if name not in collected] == []


def test_every_cell_has_a_test_or_says_that_there_is_none():
    numbers = dict(re.findall(r"^(\d+)\. `(.+)`$", SUPPORT, re.MULTILINE))
    assert list(numbers) == [str(number) for number in range(1, len(numbers) + 1)]
    assert len(set(numbers.values())) == len(numbers)
    assert len(CELLS) > 200
    used = {re.fullmatch(r"(?:GPU |rejected )?\[(\d+)\]", cell)[1] for cell in CELLS if cell != "untested"}
    assert used == numbers.keys()
    for cell in CELLS:
        if cell.startswith("GPU"):
            assert numbers[cell.split()[1].strip("[]")].startswith("tests/gpu/")
