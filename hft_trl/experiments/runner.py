"""Run many commands for methods, learning rates and seeds. The same call resumes an interrupted one."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hft_trl.environment import package_version
from hft_trl.errors import HFTError
from hft_trl.files import read_or_reject, write_json, writing
from hft_trl.redact import redact

SETTINGS_FILE = "settings.json"
POLL_SECONDS = 0.1
# Commands end with their parent, so that a killed runner leaves no process that still writes
START = (
    "import ctypes, os, sys\n"
    "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM\n"
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


@dataclass(frozen=True)
class Point:
    """A command, run in its own process, and the file that it writes last."""

    name: str
    command: tuple[str, ...]  # it should resume when it is started again
    result: Path


def result_file(output: Path, name: str) -> Path:
    return output / "scores" / f"{name}.json"


def run_points(points: Sequence[Point], output: Path, workers: int | None = None) -> Iterator[Point]:
    """
    Run the command of every point without its result, and yield each point when it is finished.

    Each process (`workers` at once, by default one per GPU, or per core) has one GPU or one thread, and logs to
    `runs/NAME.log`. If a command fails or is ended by a signal twice, an [`HFTError`] is raised. After an error, or if
    the caller stops, the other processes get a SIGTERM.
    """
    waiting = [point for point in points if not point.result.exists()]
    gpus = _gpus()
    workers = workers or len(gpus) or os.cpu_count() or 1
    free = [gpus[number % len(gpus)] if gpus else "" for number in range(workers)]
    logs = {point: output / "runs" / f"{point.name}.log" for point in points}
    running: dict[Point, tuple[str, subprocess.Popen]] = {}
    killed: set[Point] = set()
    for name in ("scores", "runs"):
        (output / name).mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            while waiting and free:
                point, gpu = waiting.pop(0), free.pop(0)
                # With a process per core, more threads would wait for each other
                environ = {**os.environ, "OMP_NUM_THREADS": "1", **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
                command = [sys.executable, "-c", START, *point.command]
                with logs[point].open("a", encoding="utf-8") as log:
                    running[point] = gpu, subprocess.Popen(command, env=environ, stdout=log, stderr=log)
            while not (ended := [point for point, (_, child) in running.items() if child.poll() is not None]):
                time.sleep(POLL_SECONDS)
            for point in ended:
                gpu, child = running.pop(point)
                free.append(gpu)
                code = child.returncode
                if code < 0 and point not in killed:  # resumes once, for example after running out of memory
                    killed.add(point)
                    waiting.insert(0, point)
                elif code or not point.result.exists():
                    what = f"ended with {code}" if code else "ended without its result"
                    lines = logs[point].read_text(encoding="utf-8", errors="replace").split("\n")
                    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
                    shown = shlex.join(redact(point.command))
                    raise HFTError(f"{shown} {what}. {logs[point]} ends with: {last}")
                else:
                    yield point
    finally:
        for _, child in running.values():
            child.terminate()
        for _, child in running.values():
            child.wait()


def check_settings(
    output: Path, settings: Mapping[str, str], packages: Iterable[str] = (), optional: Iterable[str] = ()
) -> None:
    """
    Record settings and library versions of the folder's results, and reject different ones.

    Those in `optional` may be missing before or now, since only some of the points need them.
    """
    names = ("torch", "transformers", "trl", *packages)
    settings = {"versions": ", ".join(f"{name} {package_version(name)}" for name in names), **settings}
    path = output / SETTINGS_FILE
    before: dict[str, str] = {}
    if path.exists():
        before = read_or_reject(path, "use another output_dir")
        for key in before | settings:
            there, here = before.get(key), settings.get(key)
            if there != here and not (key in optional and None in (there, here)):
                raise HFTError(
                    f"{output} holds scores made with the {key} {there or 'none'}, now they are {here or 'none'}: "
                    "use the same, or another output_dir."
                )
    with writing(output):
        (output / "scores").mkdir(parents=True, exist_ok=True)
        write_json(path, before | settings)


def _gpus() -> list[str]:
    """Return the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
