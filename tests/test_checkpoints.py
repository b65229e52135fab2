"""Checkpoints: a torn one is named and passed over, the newest whole one is found."""

import json
import shutil

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hft_trl import HFTConfig, select
from hft_trl.checkpoints import last_finite_checkpoint, last_whole_checkpoint, selection_of, torn_because


def checkpoint(folder, step):
    """What a trainer leaves, as far as wholeness is concerned."""
    path = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    path.mkdir()
    save_file({"w": torch.full((100,), float(step))}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        (path / name).write_bytes(b"x")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def test_the_newest_whole_checkpoint_is_found_by_its_step(tmp_path):
    assert last_whole_checkpoint(tmp_path / "missing") is None
    assert last_whole_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        checkpoint(tmp_path, step)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_with_a_missing_file_is_passed_over_and_kept(tmp_path, name):
    checkpoint(tmp_path, 1)
    torn = checkpoint(tmp_path, 2)
    (torn / name).unlink()
    assert name in torn_because(torn)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert torn.is_dir()


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
def test_a_checkpoint_with_a_file_cut_short_is_passed_over(tmp_path, name):
    checkpoint(tmp_path, 1)
    torn = checkpoint(tmp_path, 2) / name
    torn.write_bytes(torn.read_bytes()[:-3])
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_checkpoint_with_weights_that_are_not_finite_is_no_good_one(tmp_path):
    checkpoint(tmp_path, 1)
    path = checkpoint(tmp_path, 2) / "model.safetensors"
    weights = load_file(path)
    weights["w"][3] = float("nan")
    save_file(weights, path)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    assert last_finite_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert last_finite_checkpoint(tmp_path / "missing") is None


def test_a_models_selection_is_found_in_its_folder_and_nowhere_else(base, tmp_path):
    folder = tmp_path / "trained"
    shutil.copytree(base, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert selection_of(model) is None
    selection = select(model, HFTConfig())
    selection.save(folder)
    assert selection_of(model).digest == selection.digest
    assert selection_of(tiny_llama(300)) is None
    model.config._name_or_path = str(tmp_path / "gone by now")
    assert selection_of(model) is None
