"""Launches with DeepSpeed on CPU processes. The files are those that are shipped; flags turn off what needs a GPU."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import PATIENCE

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = Path(__file__).parent


def launch(
    zero_stage: int,
    program: str,
    *arguments,
    flags=("--mixed_precision", "no"),
    num_processes: int = 2,
    check=True,
    **environment,
) -> subprocess.CompletedProcess:
    """Run a program of this folder under a shipped ZeRO file."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", f"accelerate_configs/zero{zero_stage}.yaml", "--num_processes", str(num_processes), *flags),
        *(str(PROGRAMS / program), *map(str, arguments)),
    ]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", **{key: str(value) for key, value in environment.items()}},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert not check or result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result
