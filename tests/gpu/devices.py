"""The devices that a test runs on, and a training in a process of its own on one of them."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, tulu_row, ultrafeedback_row
from datasets import Dataset
from training import ResumableDPOTrainer, ResumableSFTTrainer, dpo_trainer, losses, sft_trainer
from transformers import TrainerCallback
from warm import SERVER

from hft_trl import HFTConfig

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")]
GPU = pytest.param("cuda", marks=NEEDS_GPU)
on_each_device = pytest.mark.parametrize("device", ["cpu", GPU])
"""The same body on a CPU in the ordinary suite, and on a GPU with `make test-gpu`."""

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


class Kill(TrainerCallback):
    """Kills its own process before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, base, device, stage="sft", kill_at=None, resume=False, offload=None, hft=None, **settings):
    """Train and save. `offload` is whether FSDP2 over this one process keeps its shards in main memory."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if offload is not None:
        shard_over_one_rank(device, folder, offload)
    rows = Dataset.from_list([ROWS[stage](number) for number in range(32)])
    make, kind = {"sft": (sft_trainer, ResumableSFTTrainer), "dpo": (dpo_trainer, ResumableDPOTrainer)}[stage]
    trainer = make(kind, base, rows, folder, HFTConfig(**hft or {}), **{**on(device), **settings})
    if kill_at is not None:
        trainer.add_callback(Kill(kill_at))
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()
    seen = {"losses": losses(trainer), "fsdp": trainer.is_fsdp_enabled, "device": str(trainer.model.device)}
    (folder / "seen.json").write_text(json.dumps({**seen, "frozen": trainer.hft_selection.frozen}))


def shard_over_one_rank(device: str, folder: Path, offload: bool) -> None:
    """Set what `accelerate launch` would set for FSDP2 with one process."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "processes"))
    import fsdp_on_cpu
    from launch import free_port

    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "LOCAL_RANK": "0"}
    fsdp = {
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_OFFLOAD_PARAMS": str(offload),
    }
    kept = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    os.environ.update({**where, **fsdp, **kept, "WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "true"})
    os.environ["FSDP_RESHARD_AFTER_FORWARD"] = "true"
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        fsdp_on_cpu.enable()
