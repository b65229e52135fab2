"""How far units moved: the numbers of a direct computation, with no arithmetic where nothing did."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file, save_file

from hft_trl import HFTConfig
from hft_trl.recipe import measure
from hft_trl.recipe.arguments import ModelArguments
from hft_trl.recipe.measure import movements
from hft_trl.saved_models import diff
from hft_trl.selection import find_units, select
from hft_trl.weights import fingerprint

FILE = "model.safetensors"


@pytest.fixture
def trained(base, tmp_path):
    """
    A run's first start model, a stage's start model, where everything moved, and the stage, where what was selected
    did.
    """
    model = tiny_llama(300)
    selection = select(model, HFTConfig())
    start, folder = tmp_path / "start", tmp_path / "tuned"
    for source, target, names in ((base, start, None), (start, folder, set(selection.trainable))):
        shutil.copytree(source, target)
        weights = load_file(source / FILE)
        moved = {name: w + 0.1 * torch.randn_like(w) for name, w in weights.items() if names is None or name in names}
        save_file(weights | moved, target / FILE, metadata={"format": "pt"})
    models = {"model": ModelArguments(str(start)), "base": ModelArguments(str(base))}
    return base, SimpleNamespace(**models, folder=folder), selection


def relative(before, after, names) -> float:
    difference, size = (
        torch.cat([x.flatten() for x in part]).double()
        for part in zip(*((after[n] - before[n], before[n]) for n in names), strict=True)
    )
    return (difference.norm() / size.norm()).item()


def test_movements_are_the_relative_distances_from_base_and_start(trained):
    base, stage, selection = trained
    found = {change.name: change for change in movements(stage, selection)}
    files = [load_file(folder / FILE) for folder in (base, stage.folder.with_name("start"), stage.folder)]
    units = find_units(tiny_llama(300))
    assert list(found) == [unit.names[0] for unit in units]
    for unit in units:
        change = found[unit.names[0]]
        assert (change.layer, change.category, change.slot) == (unit.layer, unit.category, unit.slot)
        assert change.trainable == (unit.names[0] in selection.trainable)
        assert change.relative_change == pytest.approx(relative(files[0], files[2], unit.names), rel=1e-6)
        assert change.relative_change_from_start == pytest.approx(relative(files[1], files[2], unit.names), rel=1e-6)
        assert (change.relative_change_from_start == 0.0) == (not change.trainable)


def test_only_what_learned_is_compared_and_a_first_stage_only_once(trained, monkeypatch):
    _, stage, selection = trained
    names = {fingerprint(tensor): name for name, tensor in load_file(stage.folder / FILE).items()}
    change, compared = diff.change, []
    monkeypatch.setattr(diff, "change", lambda old, new: compared.append(names[fingerprint(new)]) or change(old, new))
    stage.base = None
    found = movements(stage, selection)
    assert sorted(compared) == sorted(selection.trainable)
    assert all(change.relative_change == change.relative_change_from_start for change in found)


def test_the_processes_share_the_units_out(trained, monkeypatch):
    """Of three processes each compares its own part; all parts together are what one process finds."""
    _, stage, selection = trained
    alone = movements(stage, selection)
    parts = []
    monkeypatch.setattr(measure, "gather_object", lambda part: parts.append(part) or part)
    for rank in range(3):
        monkeypatch.setattr(
            measure, "PartialState", lambda rank=rank: SimpleNamespace(process_index=rank, num_processes=3)
        )
        movements(stage, selection)
    shares = parts[::2]
    assert {len(share) for share in shares} <= {len(alone) // 3, len(alone) // 3 + 1}
    assert [
        change for _, change in sorted((pair for share in shares for pair in share), key=lambda pair: pair[0])
    ] == alone


def test_tensors_under_other_names_in_the_file_and_of_other_shapes(trained):
    """A file without the model's prefix is understood; a tensor of another shape has no distance."""
    base, stage, selection = trained
    alone = movements(stage, selection)
    weights = {name.removeprefix("model."): tensor for name, tensor in load_file(base / FILE).items()}
    other = stage.folder.parent / "other"
    shutil.copytree(base, other)
    save_file(weights, other / FILE, metadata={"format": "pt"})
    stage.base = ModelArguments(str(other))
    assert movements(stage, selection) == alone
    save_file(weights | {"lm_head.weight": torch.ones(7, 32)}, other / FILE, metadata={"format": "pt"})
    found = {change.name: change for change in movements(stage, selection)}
    assert found["lm_head.weight"].relative_change is None
    assert found["lm_head.weight"].relative_change_from_start > 0


def test_a_base_that_is_gone_leaves_movements_out(trained):
    _, stage, selection = trained
    stage.base = ModelArguments(str(stage.folder.parent / "gone"))
    assert movements(stage, selection) == []


def test_a_later_stage_is_compared_with_the_run_s_revision_of_the_base(trained, tmp_path, monkeypatch):
    base, stage, selection = trained
    alone, repository = movements(stage, selection), tmp_path / "models--org--base"
    for revision, source in (("v1", base), ("main", stage.folder)):
        shutil.copytree(source, repository / "snapshots" / revision)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    stage.base = ModelArguments("org/base", "v1")
    assert movements(stage, selection) == alone
    stage.base = ModelArguments("org/base")
    assert {change.relative_change for change in movements(stage, selection)} == {0}
