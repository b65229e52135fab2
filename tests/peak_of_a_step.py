"""
Peak resident set of the second step of real trainings, each less what was resident before its model was loaded.

`python peak_of_a_step.py JSON` prints a list of bytes. Each training has a process of its own, forked from one that
has loaded everything and trained once.
"""

import gc
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import transformers
from steps import real_step
from transformers import AutoTokenizer

from hft_trl import HFTConfig


def resident() -> int:
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measured(request: dict[str, Any], small: str, large: str, tokenizer: Any, folder: str) -> int:
    # Once in this process too: what a fork has not touched yet of the libraries is not resident
    real_step(small, tokenizer, folder, request["stage"], HFTConfig(), 1, 16, trace=False)
    gc.collect()
    before = resident()
    hft, checkpointing = HFTConfig(method=request["method"]), request["checkpointed"] > 0
    trainer = real_step(
        large, tokenizer, folder, request["stage"], hft, request["micro_batch"], request["length"], trace=False,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    return trainer.resident_peak - before


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    job = json.loads(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(job["small"])
    real_step(job["small"], tokenizer, job["folder"], "dpo", HFTConfig(), 1, 16, trace=False)
    found = []
    for request in job["requests"]:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writer, str(measured(request, job["small"], job["large"], tokenizer, job["folder"])).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            found.append(int(answer.read()))
        os.waitpid(child, 0)
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
