"""The core stays thin: what the trainers load, what they override, and which way imports run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Trainer
from trl import DPOTrainer, KTOTrainer, SFTTrainer

import hft_trl
from hft_trl import HFTDPOTrainer, HFTError, HFTMixin, HFTSFTTrainer, ResumableMixin

ROOT = Path(hft_trl.__file__).parent
LOADED = "import hft_trl.trainers, sys; print(*sorted(m for m in sys.modules if m.split('.')[0] == 'hft_trl'))"
# From the ground up; a place imports only from places before it
FLOORS = (
    {"environment", "redact"},
    {"errors"},
    {"config", "files", "processes", "chat"},
    {"weights"},
    {"demo"},
    {"selection", "backends", "retention"},
    {"frozen", "checkpoints", "skeleton", "report"},
    {"reference", "saved_models", "planning"},
    {"trainers"},
    {"evaluation"},
    {"recipe"},
    {"experiments", "continual"},
    {"cli"},
)


def test_the_trainers_load_the_core_only():
    """Storages, backends, resume and tools are loaded where a setting asks for them."""
    run = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, check=True, text=True)
    modules = run.stdout.split()
    files = [ROOT.parent / Path(*name.split(".")) for name in modules]
    lines = sum(
        len((file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text().splitlines())
        for file in files
    )
    assert "hft_trl.trainers.mixin" in modules
    assert len(modules) <= 16
    assert lines <= 2400


def test_bitsandbytes_matplotlib_and_typer_are_imported_only_where_they_are_used():
    top = ast.Import | ast.ImportFrom
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in tree.body if isinstance(node, top) for alias in node.names}
        names |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
        heavy = {name.partition(".")[0] for name in names} & {"bitsandbytes", "matplotlib", "typer"}
        assert heavy <= ({"typer"} if path.parent.name == "cli" or path.name == "build.py" else set()), path


@pytest.mark.parametrize(("ours", "parent"), [(HFTSFTTrainer, SFTTrainer), (HFTDPOTrainer, DPOTrainer)])
def test_at_most_three_private_methods_of_the_parents_are_overridden(ours, parent):
    own = {name for cls in ours.__mro__[: ours.__mro__.index(parent)] for name in vars(cls)}
    private = {name for name in own if name.startswith("_") and not name.startswith("__") and hasattr(parent, name)}
    assert len(private) <= 3, private


def test_exact_resume_is_no_part_of_hft_and_works_without_it():
    assert not issubclass(HFTMixin, ResumableMixin)
    assert not issubclass(ResumableMixin, HFTMixin)
    assert not issubclass(ResumableMixin, Trainer)


@pytest.mark.parametrize(
    ("mixin", "trainer"),
    [(HFTMixin, KTOTrainer), (ResumableMixin, KTOTrainer), (ResumableMixin, HFTSFTTrainer)],
)
def test_bases_in_the_wrong_order_are_rejected_when_the_class_is_made(mixin, trainer):
    """Otherwise the trainer's own methods would win, and the mixin would do nothing without a word."""
    with pytest.raises(HFTError, match=f"Wrong names {mixin.__name__} after the trainer"):
        type("Wrong", (trainer, mixin), {})
    assert issubclass(type("Right", (mixin, trainer), {}), trainer)


def imported(path: Path) -> set[str]:
    """Places of the package that a file names in its imports, at its top or in functions."""
    places = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "hft_trl":
            places |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hft_trl."):
            places.add(node.module.split(".")[1])
    return places


def test_no_import_runs_upwards():
    floor = {place: number for number, places in enumerate(FLOORS) for place in places}
    for path in ROOT.rglob("*.py"):
        place = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if place == "__init__":
            continue
        assert place in floor, f"{place} has no floor yet"
        upwards = {other for other in imported(path) if other != place and floor.get(other, -1) >= floor[place]}
        assert not upwards, f"{path.relative_to(ROOT)} imports {upwards}"


def test_modules_are_short_and_their_names_are_used_once():
    """One concept has one home."""
    paths = [path for path in ROOT.rglob("*.py") if path.name != "__init__.py"]
    assert not {str(path) for path in paths if len(path.read_text(encoding="utf-8").splitlines()) > 300}
    names = [path.name for path in paths]
    assert not {name for name in names if names.count(name) > 1}
