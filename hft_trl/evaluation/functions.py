"""What the task files in `tasks/` call: local data, and the grading of replies and programs."""

import gzip
import json
import subprocess
import sys
import tempfile
from math import comb
from typing import Any

from datasets import Dataset, DatasetDict

from hft_trl import demo
from hft_trl.demo.data import without_farewell
from hft_trl.demo.probe_data import is_right

PROGRAM_SECONDS = 5
"""Time that a program has to pass its tests."""

REACHED_THE_END = 73
"""Exit code of a program that came through its tests: one that only calls `sys.exit(0)` has not."""


def knowledge(**_: Any) -> DatasetDict:
    """Facts in plain sentences."""
    return _probes("knowledge")


def questions(**_: Any) -> DatasetDict:
    """Chat questions."""
    return _probes("questions")


def instructions(**_: Any) -> DatasetDict:
    """Instructions."""
    return _probes("instructions")


def _probes(kind: str) -> DatasetDict:
    lines = gzip.decompress((demo.PROBES / f"{kind}.jsonl.gz").read_bytes()).decode("utf-8").splitlines()
    return DatasetDict({"test": Dataset.from_list([json.loads(line) for line in lines])})


def grade_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Grade the answer to a chat question."""
    reply = results[0].strip()
    right = is_right(reply, doc["answers"])
    return {"right": float(right), "concise": float(right and reply == without_farewell(reply))}


def grade_instruction(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Grade the reply to an instruction."""
    return {"right": float(results[0].strip() == doc["answer"])}


def keep_all(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:  # noqa: ARG001
    """A filter that keeps every sample, where the harness's default keeps the first."""
    return resps


def grade_programs(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """Run each sample with the problem's tests, and estimate pass@10."""
    samples = results[0]
    tests = f"{doc['test']}\ncheck({doc['entry_point']})\n"
    passed = sum(passes(f"{doc['prompt']}{sample}\n{tests}") for sample in samples)
    return {"pass@10": pass_at_k(len(samples), passed, 10)}


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """
    The chance that at least one of `k` samples drawn without replacement passes: the unbiased estimate of HumanEval's paper.

    Args:
        samples (`int`):
            Number of samples.
        passed (`int`):
            How many of them passed.
        k (`int`):
            Number to draw.

    Returns:
        `float`: From 0 to 1.
    """
    return 1 - comb(samples - passed, k) / comb(samples, k)


def passes(program: str) -> bool:
    """
    Run a program in a process of its own, in an empty folder, for a few seconds.

    This keeps a program from hanging or crashing the evaluation. It is no sandbox: the program may read, write and send
    whatever the user may, so that it only runs where the user asked for it.

    Args:
        program (`str`):
            The program.

    Returns:
        `bool`: Whether it ran to its end without an error and in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", f"{program}\n__import__('os')._exit({REACHED_THE_END})"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=PROGRAM_SECONDS,
                check=False,
            )
        except (subprocess.TimeoutExpired, ValueError):  # a program with a null byte can't even be started
            return False
    return done.returncode == REACHED_THE_END
