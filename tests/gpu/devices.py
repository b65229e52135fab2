"""The devices that a test runs on, and a training in a process of its own on one of them."""

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATIENCE, tulu_row, ultrafeedback_row
from datasets import Dataset
from leaving import leave
from training import ResumableDPOTrainer, ResumableSFTTrainer, dpo_trainer, losses, sft_trainer, weights
from transformers import TrainerCallback
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available
from warm import SERVER

from hft_trl import HFTConfig
from hft_trl.weights import fingerprint

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")]
GPU = pytest.param("cuda", marks=NEEDS_GPU)
on_each_device = pytest.mark.parametrize("device", ["cpu", GPU])
"""The same body on a CPU in the ordinary suite, and on a GPU with `make test-gpu`."""

needs_liger = pytest.mark.skipif(not is_liger_kernel_available(), reason="liger-kernel is not installed")
needs_flash = pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
FLASH = {"model_init_kwargs": {"attn_implementation": "flash_attention_2"}, "packing": True, "max_length": 64}
ON_A_GPU = [
    *(
        pytest.param(stage, {"use_liger_kernel": True}, marks=needs_liger, id=f"liger-{stage}")
        for stage in ("sft", "dpo")
    ),
    *(pytest.param(s, {"activation_offloading": True}, id=f"activation_offloading-{s}") for s in ("sft", "dpo")),
    pytest.param("sft", FLASH, marks=needs_flash, id="flash-sft"),
]
"""Stage and settings of what only a GPU can do."""

ROWS = {"sft": tulu_row, "dpo": ultrafeedback_row}


def on(device: str) -> dict[str, bool]:
    """Arguments of a trainer in bf16 autocast on a device."""
    return {"use_cpu": device == "cpu", "bf16": True}


def in_own_process(folder: Path, *arguments, settings=None, **keywords) -> int:
    """Run [`train`] in a process of its own and return the exit code, negative for a signal."""
    folder.mkdir(parents=True, exist_ok=True)
    process = SERVER.Process(target=train, args=(folder, *arguments), kwargs={**keywords, **(settings or {})})
    process.start()
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def log(folder: Path) -> str:
    return (folder / "log").read_text()[-3000:]


def kept(base: Path, folder: Path, backend: str) -> dict[str, Any]:
    """Assert that [`train`] ran under a backend, learned, and kept the frozen half. Return what it saw."""
    seen, start, saved = json.loads((folder / "seen.json").read_text()), weights(base), weights(folder)
    assert seen["backend"] == backend
    assert saved.keys() == start.keys()
    assert all(map(math.isfinite, seen["losses"]))
    moved = {name for name in saved if fingerprint(saved[name]) != fingerprint(start[name])}
    assert moved
    assert not moved & set(seen["frozen"])
    return seen


class Kill(TrainerCallback):
    """Kills its own process before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, base, device, stage="sft", kill_at=None, resume=False, launch=None, hft=None, **settings):
    """Train and save, with `launch` as the only process of a launch of [`LAUNCHES`]."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if launch is not None:
        launch_one_rank(device, launch)
    rows = Dataset.from_list([ROWS[stage](number) for number in range(32)])
    make, kind = {"sft": (sft_trainer, ResumableSFTTrainer), "dpo": (dpo_trainer, ResumableDPOTrainer)}[stage]
    trainer = make(kind, base, rows, folder, HFTConfig(**hft or {}), **{**on(device), **settings})
    if kill_at is not None:
        trainer.add_callback(Kill(kill_at))
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()
    plugin = trainer.accelerator.state.deepspeed_plugin
    backend = f"zero{plugin.zero_stage}" if plugin else trainer.accelerator.distributed_type.value
    seen = {"losses": losses(trainer), "backend": backend, "device": str(trainer.model.device)}
    (folder / "seen.json").write_text(json.dumps({**seen, "frozen": trainer.hft_selection.frozen}))
    if launch is not None:
        leave()


FSDP2 = {
    **{"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"},
    **{"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
LAUNCHES = {
    "ddp": {},
    "fsdp2": {**FSDP2, "FSDP_OFFLOAD_PARAMS": "false"},
    "fsdp2, offloaded": {**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"},
    "zero2": {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"},
}
"""What `accelerate launch` sets in a process."""


def launch_one_rank(device: str, launch: str) -> None:
    """Set what `accelerate launch` would set for one process."""
    sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("processes", "zero")]
    import fsdp_on_cpu
    from launch import free_port

    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ.update({**where, **LAUNCHES[launch], "WORLD_SIZE": "1"})
    if device == "cpu" and launch.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see zero/watched.py
    elif device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        fsdp_on_cpu.enable()
