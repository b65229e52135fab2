"""What goes wrong inside a process that a test started: it dies, or is asked to end, at a chosen write or step."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
import transformers.modeling_utils
from transformers import Trainer

from hft_trl.checkpoints import whole


def at_write(event: str, path: str, count: int = 1, number: int = signal.SIGKILL) -> None:
    """
    Send a signal just before Python opens for writing (`open`), renames onto (`os.rename`), ...

    a path's `count`-th time.
    """
    left = [count]

    def watch(happening: str, args: tuple) -> None:
        if happening != event:
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        name = args[1] if event == "os.rename" else args[0]
        if isinstance(name, str | os.PathLike) and Path(name).match(path):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)

    sys.addaudithook(watch)


def half_written(path: str) -> None:
    """Die when torch or safetensors, whose writers Python does not see, has written half of a file."""

    def halving(save):
        def save_half(content, file, *args, **kwargs):
            save(content, file, *args, **kwargs)
            if Path(file).match(path):
                os.truncate(file, Path(file).stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return save_half

    torch.save = halving(torch.save)
    safetensors.torch.save_file = halving(safetensors.torch.save_file)
    transformers.modeling_utils.safe_save_file = halving(transformers.modeling_utils.safe_save_file)


def _in_step(stage: str, step: int, act) -> None:
    train = Trainer.training_step

    def training_step(self, *args, **kwargs):
        if Path(self.args.output_dir).name == stage and self.state.global_step + 1 == step:
            act()
        return train(self, *args, **kwargs)

    Trainer.training_step = training_step


def signal_in_step(stage: str, step: int, number: int, rank: int = 0) -> None:
    """Send a signal to one process while it computes a step."""
    if int(os.environ.get("RANK", "0")) == rank:
        _in_step(stage, step, lambda: os.kill(os.getpid(), number))


def slow_disk(stage: str, step: int, seconds: float) -> None:
    """Send SIGTERM to the second process in a step. The first one's checkpoints take long to reach the disk."""
    signal_in_step(stage, step, signal.SIGTERM, 1)
    flush = whole.flush

    def flush_slowly(folder: Path) -> None:
        time.sleep(seconds)
        flush(folder)

    whole.flush = flush_slowly


def full_from_step(stage: str, step: int, largest: int) -> None:
    """From a step on, no file can grow beyond a size: writing fails as on a full disk, for real."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    _in_step(stage, step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard)))


def vanish_in_step(stage: str, step: int, path: str) -> None:
    """Remove a file while a stage trains."""
    _in_step(stage, step, lambda: Path(path).unlink())
