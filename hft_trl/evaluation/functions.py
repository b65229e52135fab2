"""Functions that the task files in `tasks/` call: local data, and grading of replies and programs."""

import subprocess
import sys
import tempfile
from math import comb
from typing import Any

from datasets import Dataset, DatasetDict

from hft_trl.demo.probes import is_right, probe_rows, without_farewell

PROGRAM_SECONDS = 5  # that a program has to pass its tests
REACHED_THE_END = 73  # exit code after the tests, which a program that only calls `sys.exit(0)` does not give


def probes(kind: str, **_: Any) -> DatasetDict:
    """Load one kind of the embedded world's probes."""
    return DatasetDict({"test": Dataset.from_list(probe_rows(kind))})


def grade_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    reply = results[0].strip()
    right = is_right(reply, doc["answers"])
    return {"right": float(right), "concise": float(right and reply == without_farewell(reply))}


def grade_instruction(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"right": float(results[0].strip() == doc["answer"])}


def grade_programs(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """Run each sample with the problem's tests, and estimate pass@10."""
    samples = results[0]
    tests = f"{doc['test']}\ncheck({doc['entry_point']})\n"
    passed = sum(passes(f"{doc['prompt']}{sample}\n{tests}") for sample in samples)
    return {"pass@10": pass_at_k(len(samples), passed, 10)}


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Estimate without bias the chance that one of `k` samples passes (HumanEval's paper)."""
    return 1 - comb(samples - passed, k) / comb(samples, k)


def passes(program: str) -> bool:
    """
    Return whether a program ends in time and without an error, in its own process and an empty folder.

    This keeps a program from hanging or crashing the evaluation. It is no sandbox: the program has all the rights of
    the user.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-c", f"{program}\n__import__('os')._exit({REACHED_THE_END})"]
        silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        try:
            done = subprocess.run(command, cwd=folder, timeout=PROGRAM_SECONDS, check=False, **silent)
        except (subprocess.TimeoutExpired, ValueError):  # a program with a null byte cannot be started
            return False
    return done.returncode == REACHED_THE_END
