"""The pages that name tests are right about them: each test exists, and is collected."""

import re
from pathlib import Path

import pytest
from features import FAILS, REJECTED

ROOT = Path(__file__).parent.parent
SUPPORT = (ROOT / "docs/support.md").read_text(encoding="utf-8")
PAGES = {"support": SUPPORT, "from": (ROOT / "docs/from.md").read_text(encoding="utf-8")}
NAMED = {page: re.findall(r"`(tests/[^`]+::[^`]+)`", text) for page, text in PAGES.items()}
LAUNCHES = {
    **dict.fromkeys(("ddp", "fsdp2"), "tests/processes/test_support_in_two_processes.py"),
    **dict.fromkeys(("zero2", "zero3"), "tests/zero/test_support_zero.py"),
}
ALONE = "tests/trainers/test_trl_features.py"
ON_A_GPU = {
    **dict.fromkeys(("ddp", "fsdp2"), "tests/gpu/test_features.py"),
    **dict.fromkeys(("zero2", "zero3"), "tests/zero/test_zero_with_one_rank.py"),
}
# Stage, case, launch and text of each cell
CELLS = [
    (stage, case, launch, cell)
    for stage in ("sft", "dpo")
    for line in SUPPORT.partition(f"## {stage.upper()}\n")[2].partition("\n## ")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| feature")
    for _, case, *cells in [line.strip("| ").split(" | ")]
    for launch, cell in zip(("alone", *LAUNCHES), cells, strict=True)
]


class Collector:
    """Keeps what pytest collects."""

    def pytest_collection_finish(self, session):
        self.found = {item.nodeid for item in session.items}


@pytest.fixture(scope="module")
def collected():
    """The tests of all files that the pages name, those of a GPU and of DeepSpeed too."""
    named = {name.partition("::")[0] for names in NAMED.values() for name in names}
    files = sorted(named | {*LAUNCHES.values(), *ON_A_GPU.values(), ALONE})
    collector = Collector()
    flags = ["--collect-only", "-qq", "-m", "", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    assert pytest.main([*flags, *(str(ROOT / file) for file in files)], plugins=[collector]) == 0
    return collector.found | {name.partition("[")[0] for name in collector.found}


@pytest.mark.parametrize("page", NAMED)
def test_every_test_that_a_page_names_is_collected(collected, page):
    assert NAMED[page]
    assert [name for name in NAMED[page] if name not in collected] == []


def test_every_cell_has_a_test_or_a_reason():
    numbers = dict(re.findall(r"^(\d+)\. `(.+)`$", SUPPORT, re.MULTILINE))
    assert list(numbers) == [str(number) for number in range(1, len(numbers) + 1)]
    assert len(set(numbers.values())) == len(numbers)
    assert len(CELLS) > 200
    reasons = re.findall(r"^- \((.)\)", SUPPORT, re.MULTILINE)
    cells = [
        re.fullmatch(r"(yes|fails|(?:GPU |rejected )?\[(\d+)\]|rejected|GPU)(?: \((.)\))?", cell) for *_, cell in CELLS
    ]
    assert {cell[2] for cell in cells if cell[2]} == numbers.keys()
    assert {cell[3] for cell in cells if cell[3]} == set(reasons)
    for cell in cells:
        if cell[1] == "fails":
            assert cell[3]
        if cell[1].startswith("GPU ["):
            assert "cuda" in numbers[cell[2]] or numbers[cell[2]].startswith("tests/gpu/")


def test_a_cell_without_a_number_is_a_case_of_the_launches_and_says_how_it_ends(collected):
    """And every case has its cell, except for the plain training that others are compared with."""
    shown = set()
    for stage, case, launch, cell in CELLS:
        if launch != "alone" and cell.startswith(("yes", "rejected", "fails")) and "[" not in cell:
            shown.add(f"{LAUNCHES[launch]}::test_a_half_trains_with[{launch}-{stage}-{case}]")
            assert cell.startswith("rejected") == (case in REJECTED[launch])
            assert cell.startswith("fails") == (case in FAILS.get(launch, {}))
    cases = {name for name in collected if "::test_a_half_trains_with[" in name and not name.endswith("-plain]")}
    assert shown == cases


def test_a_cell_without_a_number_of_one_process_or_of_a_gpu_is_a_case_that_is_collected(collected):
    shown = set()
    for stage, case, launch, cell in CELLS:
        if launch == "alone" and "[" not in cell:
            assert cell.startswith("yes")
            shown.add(f"{ALONE}::test_a_feature_of_{stage}_trains_the_chosen_half_only[{case}]")
        elif cell.startswith("GPU") and "[" not in cell:
            name = f"test_what_needs_a_gpu_trains_with_one_rank[cuda-{launch}-{case}-{stage}]"
            shown.add(f"{ON_A_GPU[launch]}::{name}")
    assert len(shown) == 46
    assert sorted(shown - collected) == []
