"""Launching real processes as a user does, with accelerate's own launcher and the shipped configurations."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import yaml

PATIENCE = 1800  # seconds; a benchmark launches with this module too, without the tests' own
ROOT = Path(__file__).parent.parent.parent
TRAIN = Path(__file__).parent / "train.py"
RECIPES = Path(__file__).parent / "recipes.py"


def on_cpu(name: str, folder: Path, num_processes: int = 2, **changes) -> Path:
    """A shipped configuration for processes of this machine's CPU, with `changes` to its part on FSDP."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / name).read_text())
    config |= {"use_cpu": True, "num_processes": num_processes, "mixed_precision": "no"}
    config["fsdp_config"] = {**config.get("fsdp_config", {}), **changes}
    path = folder / name
    path.write_text(yaml.safe_dump(config))
    return path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(config: Path, *command, flags=()) -> subprocess.Popen:
    """`accelerate launch` in the background, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, *flags, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(*launches: subprocess.Popen) -> str:
    """Wait for launches that belong together; none of them outlives the test."""
    outputs = []
    try:
        outputs.extend(launch.communicate(timeout=PATIENCE)[0] for launch in launches)
    finally:
        for launch in launches:
            if launch.poll() is None:
                os.killpg(launch.pid, signal.SIGKILL)
    assert [launch.returncode for launch in launches] == [0] * len(launches), outputs[0][-5000:]
    return outputs[0]


def seen(output: Path, training: str) -> list[dict]:
    """What the processes saw of a training, in the order of their ranks."""
    files = sorted((output / training).glob("seen-*.json"))
    return [json.loads(file.read_text()) for file in files]
