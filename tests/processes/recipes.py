"""
Several recipes in one launch, since starting the processes takes longest: `recipes.py SCRIPT FLAG ... + SCRIPT FLAG
...`.

Under a configuration for FSDP, accelerate is made to use it on the CPU.
"""

import runpy
import sys
from pathlib import Path

import fsdp_on_cpu

sys.path.append(str(Path(__file__).parent.parent))
from leaving import leave


def main(words: list[str]) -> None:
    fsdp_on_cpu.enable()
    while words:
        end = words.index("+") if "+" in words else len(words)
        sys.argv, words = words[:end], words[end + 1 :]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
    leave()
