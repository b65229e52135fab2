"""
Recipes in processes of their own, forked from one that has the libraries loaded:

started in milliseconds, to be killed.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["hft_trl.trainers", "hft_trl.recipe", "hft_trl.demo.probes", "trl"])


class Run:
    """
    A recipe that runs.

    Args:
        log (`Path`): Where its output goes.
        recipe (`str`): Name of the recipe.
        *flags (`Any`): Its command line.
        processes (`int`): How many processes train it together.
        before (`Callable`, *optional*): Called in each process first, with `given`; must be importable.
        given (`tuple`, *optional*): Arguments of `before`.
    """

    def __init__(
        self,
        log: Path,
        recipe: str,
        *flags: Any,
        processes: int = 1,
        before: Callable[..., None] | None = None,
        given: tuple = (),
    ) -> None:
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        self.processes = []
        for rank in range(processes):
            variables = {**launched, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
            self.processes.append(
                SERVER.Process(
                    target=_main,
                    args=(
                        str(log) if rank == 0 else f"{log}.{rank}",
                        [f"recipes/{recipe}.py", *map(str, flags)],
                        variables if processes > 1 else {},
                        before,
                        given,
                    ),
                )
            )
        for process in self.processes:
            process.start()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every process that still runs."""
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def wait(self, seconds: float = 300) -> list[int] | None:
        """Every process's exit code, negative for a signal; `None` if one still runs after that time."""
        for process in self.processes:
            process.join(seconds)
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else codes

    def finish(self) -> str:
        """Wait for a good end and return the output."""
        codes = self.wait()
        if codes is None:
            self.send(signal.SIGKILL)
        assert codes == [0] * len(self.processes), (codes, self.output()[-3000:])
        return self.output()

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def _main(log: str, argv: list[str], variables: dict[str, str], before: Callable[..., None] | None, given: tuple):
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.argv = argv
    if before is not None:
        before(*given)
    runpy.run_path(argv[0], run_name="__main__")
