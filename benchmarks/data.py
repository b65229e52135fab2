"""
The recipes on data of the real size, up to their first step: rows per second, peak memory, and what a rerun still
does.

```bash
python benchmarks/data.py                                # Tülu V2's and UltraFeedback's row counts; 25 GB of disk
python benchmarks/data.py --rows 20000 --pairs 5000      # a quick look
```

Files in the hub's schemas are generated and removed again. Row counts, rows per source and bytes per row are those of
the dataset cards (allenai/tulu-v2-sft-mixture: 326,154 conversations, 1,239,293,363 bytes, 114,046 of them from
ShareGPT with several exchanges; HuggingFaceH4/ultrafeedback_binarized: 61,135 pairs, 405,688,662 bytes). The shape
around these means is an assumption: log-normal lengths, a geometric number of exchanges. The words are the embedded
tokenizer's, at about four characters a token. Seconds are those between a progress bar's first and last line. Memory
is read from /proc (Linux): the resident peak of the recipe's process and of the largest of the workers that prepare
data for it, in which memory-mapped files count as far as they were read, though the system may take those pages back;
and what all of them own together without such files.
"""

import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hft_trl.chat import load_tokenizer
from hft_trl.demo import MODEL
from hft_trl.report import environment

ROOT = Path(__file__).parent.parent
ROWS, PAIRS = 326_154, 61_135
CONVERSATIONS = 114_046 / ROWS
BAR = re.compile(r"^(?P<name>[^:|]*?):? *(?:\d+%\|.*\| )?(?P<done>\d+)(?:/\d+)? (?:examples )?\[")


class Text:
    """Random text: slices of one long string of the embedded tokenizer's words and of numbers."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        words = sorted(word[1:] for word in load_tokenizer(str(MODEL)).get_vocab() if re.fullmatch("Ġ[A-Za-z]+", word))
        chosen = self.random.choices(words, k=1_000_000)
        numbers = [str(self.random.randrange(1000)) if self.random.random() < 0.2 else word for word in chosen]
        self.pool = " ".join(numbers)

    def take(self, mean: int) -> str:
        """Text of log-normal length around `mean` characters."""
        length = min(int(self.random.lognormvariate(math.log(mean) - 0.5, 1.0)) + 1, 100_000)
        start = self.random.randrange(len(self.pool) - length)
        return self.pool[start : start + length]


def conversations(rows: int, seed: int) -> Iterator[dict]:
    """Rows in the schema of `allenai/tulu-v2-sft-mixture`."""
    text = Text(seed)
    for number in range(rows):
        long = text.random.random() < CONVERSATIONS
        messages = []
        for _ in range(1 + int(text.random.expovariate(1 / 4)) if long else 1):
            messages.append({"role": "user", "content": text.take(350 if long else 700)})
            messages.append({"role": "assistant", "content": text.take(1400 if long else 500)})
        source = "sharegpt" if long else "flan_v2"
        yield {"dataset": source, "id": f"{source}_{number}", "messages": messages}


def pairs(rows: int, seed: int) -> Iterator[dict]:
    """Rows in the schema of `HuggingFaceH4/ultrafeedback_binarized`."""
    text = Text(seed)
    for number in range(rows):
        prompt = text.take(680)
        sides = [
            [{"content": prompt, "role": "user"}, {"content": text.take(mean), "role": "assistant"}]
            for mean in (1300, 1150)
        ]
        yield {
            "prompt": prompt,
            "prompt_id": f"{number:064x}",
            "chosen": sides[0],
            "rejected": sides[1],
            "messages": sides[0],
            "score_chosen": 8.0,
            "score_rejected": 6.5,
        }


def write(rows: Iterator[dict], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


@dataclass
class Phase:
    """What one progress bar showed."""

    rows: int
    seconds: float


@dataclass
class Run:
    """A recipe from its start to its first step."""

    recipe: str
    cached: bool
    first_step_seconds: float = math.nan
    peak_memory_bytes: int = 0
    worker_peak_memory_bytes: int = 0
    own_memory_bytes: int = 0
    phases: dict[str, Phase] = field(default_factory=dict)


def run(recipe: str, cached: bool, flags: list[str], cache: Path) -> Run:
    """Run a recipe in a process of its own and watch its progress bars and its memory."""
    result = Run(recipe, cached)
    start, began, shown = time.perf_counter(), {}, []
    command = [sys.executable, f"recipes/{recipe}.py", *flags]
    environ = {**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        sampler = threading.Thread(target=_sample, args=(process, result))
        sampler.start()
        text = ""
        while chunk := process.stderr.read1():
            now = time.perf_counter() - start
            # A progress bar writes its carriage return before its text, so the last line is read before it has an end.
            *lines, text = re.split(r"[\r\n]", text + chunk.decode(errors="replace"))
            shown = [*shown, *lines][-50:]
            for bar in filter(None, map(BAR.match, [*lines, text])):
                name, done = bar["name"], int(bar["done"])
                if math.isnan(result.first_step_seconds) and not name and done:
                    result.first_step_seconds = now
                elif math.isnan(result.first_step_seconds) and name not in ("", "Loading weights"):
                    result.phases[name] = Phase(done, now - began.setdefault(name, now))
        sampler.join()
    if process.returncode:
        raise RuntimeError("\n".join(shown))
    return result


def _sample(process: subprocess.Popen, result: Run) -> None:
    while process.poll() is None:
        main, *workers = [_memory(pid) for pid in (process.pid, *_children(process.pid))]
        result.peak_memory_bytes = max(result.peak_memory_bytes, main[0])
        result.worker_peak_memory_bytes = max(result.worker_peak_memory_bytes, *(peak for peak, _ in workers), 0)
        result.own_memory_bytes = max(result.own_memory_bytes, sum(own for _, own in (main, *workers)))
        time.sleep(0.2)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # the process has just ended, or this is no Linux
        return []


def _memory(pid: int) -> tuple[int, int]:
    """Resident peak, and own memory now, in which a page that several processes share counts once for all of them."""
    try:
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        own = re.search(r"Pss_Anon:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
    except OSError:
        return 0, 0
    return int(peak[1]) * 1024 if peak else 0, int(own[1]) * 1024 if own else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help="conversations for recipes/sft.py, 0 for none")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs for recipes/dpo.py, 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output_dir", help="folder for files and caches, which are removed; default: a temporary one"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("flags", nargs="*", help="more flags of the recipes, after --")
    options = parser.parse_args()
    runs, sizes, console = [], {}, Console(stderr=options.json)
    with tempfile.TemporaryDirectory(dir=options.output_dir) as folder:
        for recipe, rows, generate in (("sft", options.rows, conversations), ("dpo", options.pairs, pairs)):
            if not rows:
                continue
            path = Path(folder) / f"{recipe}.jsonl"
            write(generate(rows, options.seed), path)
            sizes[recipe] = {"rows": rows, "bytes": path.stat().st_size}
            flags = [
                "--model_name_or_path", "demo", "--dataset_name", str(path), "--output_dir", f"{folder}/{recipe}",
                "--max_steps", "1", "--save_strategy", "no", "--report_to", "none",
                "--per_device_train_batch_size", "2",
                *options.flags,
            ]  # fmt: skip
            for cached in (False, True):
                runs.append(
                    run(recipe, cached, [*flags, *(["--overwrite"] if cached else [])], Path(folder) / "cache")
                )
                show(console, runs[-1], **sizes[recipe])
    console.print(environment())
    if options.json:
        sys.stdout.write(json.dumps({"files": sizes, "runs": [asdict(run) for run in runs]}, indent=2) + "\n")


def show(console: Console, result: Run, rows: int, bytes: int) -> None:
    title = f"recipes/{result.recipe}.py, {rows:,} rows, {bytes / 1e9:.2f} GB" + (", rerun" if result.cached else "")
    table = Table("phase", "rows", "seconds", "rows/s", title=title)
    for name, phase in result.phases.items():
        speed = f"{phase.rows / phase.seconds:,.0f}" if phase.seconds else ""
        table.add_row(name, f"{phase.rows:,}", f"{phase.seconds:.1f}", speed)
    console.print(table)
    console.print(
        f"first step after {result.first_step_seconds:.0f} s; resident peak {result.peak_memory_bytes / 1e9:.2f} GB, "
        f"of a worker {result.worker_peak_memory_bytes / 1e9:.2f} GB; own memory of all "
        f"{result.own_memory_bytes / 1e9:.2f} GB\n"
    )


if __name__ == "__main__":
    main()
