"""One rank of ZeRO-2 and ZeRO-3: what only a GPU can do trains a half there. On a CPU, the plain trainings."""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent.parent / "gpu"))

from devices import GPU, ON_A_GPU, in_own_process, kept, log, on_each_device

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
each_launch = pytest.mark.parametrize("launch", ["zero2", "zero3"])


@pytest.fixture(scope="module")
def half_precision(base, tmp_path_factory):
    """The base in bfloat16: DeepSpeed would cast another one whole, and with it the frozen half."""
    folder = tmp_path_factory.mktemp("base") / "bfloat16"
    shutil.copytree(base, folder)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def trained(base, folder, device, launch, stage, settings):
    assert in_own_process(folder, base, device, stage, launch=launch, settings=settings) == 0, log(folder)
    kept(base, folder, launch)


@each_launch
@pytest.mark.parametrize("stage", ["sft", "dpo"])
@on_each_device
def test_one_rank_trains_saves_and_keeps_the_frozen_half(half_precision, tmp_path, device, launch, stage):
    trained(half_precision, tmp_path / "out", device, launch, stage, {})


@pytest.mark.parametrize(("stage", "settings"), ON_A_GPU)
@each_launch
@pytest.mark.parametrize("device", [GPU])
def test_what_needs_a_gpu_trains_with_one_rank(half_precision, tmp_path, device, launch, stage, settings):
    trained(half_precision, tmp_path / "out", device, launch, stage, settings)
