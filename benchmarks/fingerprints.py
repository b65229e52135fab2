"""
Seconds to fingerprint the weights of a model, as at the start of training and at every save.

```bash
python benchmarks/fingerprints.py                    # 256 MB of bfloat16 matrices, on a GPU if there is one
python benchmarks/fingerprints.py --megabytes 6500   # the frozen half of a 7B model
```

`now` is `hft_trl.weights.fingerprints`: each thread copies pieces of its own tensors into main memory and hashes them.
`before` copies whole tensors into fresh memory in the main thread, and four threads hash them. The digests are the
same. On a CPU a copy within main memory stands for that from a GPU; `no copy` is what training on a CPU needs. All
take turns in an order that is shuffled for each round. The quotient is the median over the rounds.
"""

import argparse
import contextlib
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from hft_trl import weights

MATRIX = (4096, 2048)
Named = list[tuple[str, torch.Tensor]]


def before(tensors: Named) -> dict[str, str]:
    """Copy whole tensors in the main thread, at most four of them ahead of the threads."""
    digests, pending = {}, deque()
    with mock.patch.object(weights, "PIECE", weights.CHUNK), ThreadPoolExecutor(4) as pool:
        for name, tensor in tensors:
            if len(pending) == 4:
                done, future = pending.popleft()
                digests[done] = future.result()
            pending.append(
                (name, pool.submit(weights.fingerprint, tensor.cpu() if tensor.is_cuda else tensor.clone()))
            )
        digests.update((name, future.result()) for name, future in pending)
    return digests


def now(tensors: Named) -> dict[str, str]:
    """Copy pieces in the threads that hash them: on a CPU into memory that each thread keeps, as if it were pinned."""
    kept = threading.local()

    def on_host(piece: torch.Tensor) -> torch.Tensor:
        if not hasattr(kept, "buffer"):
            kept.buffer = torch.empty(weights.PIECE, dtype=piece.dtype)
        return kept.buffer[: piece.numel()].copy_(piece)

    stand_in = contextlib.nullcontext() if tensors[0][1].is_cuda else mock.patch.object(weights, "_on_host", on_host)
    with stand_in:
        return weights.fingerprints(tensors)


WAYS: dict[str, Callable[[Named], dict[str, str]]] = {"before": before, "now": now, "no copy": weights.fingerprints}


def measure(tensors: Named, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way in each round."""
    ways = [way for way in WAYS if way != "no copy" or not tensors[0][1].is_cuda]
    seconds, rng = {way: [] for way in ways}, random.Random(0)
    expected = weights.fingerprints(tensors)
    for _ in range(rounds):
        for way in rng.sample(ways, len(ways)):
            start = time.perf_counter()
            found = WAYS[way](tensors)
            seconds[way].append(time.perf_counter() - start)
            if found != expected:
                raise RuntimeError(f"{way} gives other digests")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="of weights (256)")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for name in ("megabytes", "rounds"):
        if vars(options)[name] < 1:
            parser.error(f"--{name} {vars(options)[name]}: it must be at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = max(1, round(options.megabytes * 1e6 / (2 * MATRIX[0] * MATRIX[1])))
    tensors = [(str(i), torch.randn(MATRIX, device=device).to(torch.bfloat16)) for i in range(count)]
    size, seconds = sum(tensor.nbytes for _, tensor in tensors), measure(tensors, options.rounds)
    table = Table("way", "seconds, median", "GB/s", "to before", title=f"{size / 1e6:,.0f} MB on {device}")
    for way, each in seconds.items():
        middle = statistics.median(each)
        quotient = statistics.median(a / b for a, b in zip(each, seconds["before"], strict=True))
        table.add_row(way, f"{middle:.3f}", f"{size / 1e9 / middle:.2f}", f"{quotient:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
