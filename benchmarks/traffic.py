"""
Bytes that training sends between processes under FSDP2: full fine-tuning, HFT, and HFT with `replicate_frozen`.

```bash
python benchmarks/traffic.py                    # the embedded model in two and in four processes, over gloo
python benchmarks/traffic.py --json --processes 2 --stages sft
```

Real processes train some steps of each stage on a CPU, and every collective operation that PyTorch runs within a step
is counted, whoever asks for it. Bytes are those that a process receives where N of them pass parts around in a ring:
(N - 1) / N of what is gathered or scattered, twice that of what is summed up everywhere.

Beside it stands what the shapes say that FSDP2 gathers (each layer and the embedding for the forward and for the
backward pass, the head once, and all of them once for the reference) and scatters (the gradients): for the embedded
model, where tests/benchmarks/test_traffic.py compares it with what was counted, and for Llama 2 7B in bfloat16, which
has not been run.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback
from trl import DPOConfig, SFTConfig

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "tests/processes"))
import fsdp_on_cpu  # FSDP on a CPU, which accelerate refuses to do
from launch import on_cpu
from leaving import leave

from hft_trl import HFTConfig, HFTDPOTrainer, HFTSFTTrainer, demo, select
from hft_trl.chat import load_tokenizer
from hft_trl.recipe.loading import load_split
from hft_trl.recipe.rows import preference_dataset, sft_dataset
from hft_trl.report import environment
from hft_trl.selection import find_units
from hft_trl.skeleton import build_on_meta, shape_of

VARIANTS = {
    "FFT": {"method": "fft"},
    "HFT": {},
    "HFT, replicated": {"replicate_frozen": True},
}
GLOBAL_BATCH = 8
SEVEN_B, GPUS = "meta-llama/Llama-2-7b-hf", 8
# What each operation of PyTorch is called here, and how often (N - 1) / N of its bytes reach a process.
OPERATIONS = {
    "_allgather_base_": ("all-gather", 1),
    "allgather_": ("all-gather", 1),
    "all_gather_into_tensor": ("all-gather", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 2),
    "all_reduce": ("all-reduce", 2),
    "broadcast_": ("broadcast", 1),
}
SILENT = ("barrier", "wait_tensor", "_wrap_tensor_autograd")  # carry no tensor from process to process
KINDS = sorted({kind for kind, _ in OPERATIONS.values()})


class Counted(TorchDispatchMode):
    """Counts the bytes of every collective operation, while `on`."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.processes, self.on, self.received = processes, False, Counter()

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # so that it runs its own operations, which come here one by one
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if self.on and namespace in ("c10d", "_c10d_functional") and name not in SILENT:
            kind, times = OPERATIONS[name]
            whole = result if name == "all_gather_into_tensor" else args[1 if "scatter" in name else 0]
            self.received[kind] += times * size(whole) * (self.processes - 1) // self.processes
        return result


def size(tensors: Any) -> int:
    """Bytes of a tensor, or of all tensors in a list of lists."""
    return tensors.nbytes if isinstance(tensors, torch.Tensor) else sum(map(size, tensors))


class WithinSteps(TrainerCallback):
    """Counts from the beginning to the end of each step, so that neither loading nor saving is among it."""

    def __init__(self, counted: Counted) -> None:
        self.counted = counted

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.counted.on = True

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.counted.on = False


def train(stage: str, hft: dict[str, Any], steps: int, folder: Path) -> dict[str, Any]:
    """Train some steps of the embedded model in every process, and count."""
    processes = int(os.environ["WORLD_SIZE"])
    config, trainer, prepare = {
        "sft": (SFTConfig, HFTSFTTrainer, sft_dataset),
        "dpo": (DPOConfig, HFTDPOTrainer, preference_dataset),
    }[stage]
    source, split = {"sft": (demo.SFT_DATA, "train"), "dpo": (demo.DPO_DATA, "train_prefs")}[stage]
    args = config(
        str(folder), use_cpu=True, bf16=False, max_steps=steps, per_device_train_batch_size=GLOBAL_BATCH // processes,
        max_length=64, report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        logging_steps=1,
    )  # fmt: skip
    trainer = trainer(
        model=str(demo.MODEL),
        args=args,
        train_dataset=prepare(load_split(str(source), f"{split}[:{GLOBAL_BATCH * steps}]"), "rows"),
        processing_class=load_tokenizer(str(demo.MODEL), "tulu"),
        hft_config=HFTConfig(**hft),
    )
    if not (trainer.accelerator.is_fsdp2 and trainer.accelerator.num_processes == processes > 1):
        raise SystemExit("accelerate runs no FSDP2 here, or one process only")  # it falls back without a word
    counted = Counted(processes)
    trainer.add_callback(WithinSteps(counted))
    with counted:
        trainer.train()
    received = {kind: counted.received[kind] / steps for kind in KINDS}
    (everyone,) = {json.dumps(each) for each in gather_object([received])}  # all processes the same
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"processes": processes, "stage": stage, "received": json.loads(everyone), "losses": losses}


def computed(model: str, variant: str, stage: str, bytes_each: int) -> dict[str, int]:
    """
    Bytes that FSDP2 gathers and scatters in a step according to the shapes.

    Weights in and out of the layers, gradients.
    """
    skeleton = build_on_meta(shape_of(model))
    hft = HFTConfig(**VARIANTS[variant])
    learns = set(select(skeleton, hft).trainable)
    reference = 1 if stage == "dpo" else 0
    found = {"layers": 0, "rest": 0, "gradients": 0}
    for unit in find_units(skeleton):
        times = (1 if unit.category in ("lm_head", "final_norm") else 2) + reference
        trained = hft.method == "fft" or unit.names[0] in learns
        if trained or not hft.replicate_frozen:
            found["rest" if unit.layer is None else "layers"] += times * unit.size * bytes_each
        found["gradients"] += unit.size * bytes_each if trained else 0
    return found


def held(model: str, bytes_each: int) -> dict[str, int]:
    """Bytes of the frozen half in each of 8 processes, sharded and whole."""
    skeleton = build_on_meta(shape_of(model))
    frozen = set(select(skeleton, HFTConfig()).frozen)
    whole = sum(p.numel() for name, p in skeleton.named_parameters() if name in frozen) * bytes_each
    return {"sharded": whole // GPUS, "whole": whole}


def launch(processes: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Have so many processes train every variant of every stage, and return what they counted."""
    with tempfile.TemporaryDirectory() as folder:
        config = on_cpu("fsdp2.yaml", Path(folder), num_processes=processes)
        words = ["--steps", str(options.steps), "--stages", *options.stages, "--worker", folder]
        result = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, __file__, *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise SystemExit(f"{processes} processes failed:\n{result.stderr[-5000:]}")
        return json.loads((Path(folder) / "counted.json").read_text())


def work(options: argparse.Namespace) -> None:
    """What each of the processes does."""
    torch.set_num_threads(1)
    fsdp_on_cpu.enable()
    records = []
    with contextlib.redirect_stdout(sys.stderr):
        for stage in options.stages:
            for variant, hft in VARIANTS.items():
                record = train(stage, hft, options.steps, options.worker / "out")
                records.append({"variant": variant, **record})
    if PartialState().is_main_process:
        (options.worker / "counted.json").write_text(json.dumps(records))
    leave()


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(width=160)
    columns = ("processes", "stage", "variant", *KINDS, "all", "all-gather to HFT", "losses to HFT")
    table = Table(*columns, title="kB received in a step")
    for row, hft in beside_hft(result["counted"]):
        received = row["received"]
        quotient = received["all-gather"] / hft["received"]["all-gather"]
        table.add_row(
            *(str(row["processes"]), row["stage"].upper(), row["variant"]),
            *(f"{number / 1e3:,.1f}" for number in (*(received[kind] for kind in KINDS), sum(received.values()))),
            *(f"{quotient:.3f}", "the same" if row["losses"] == hft["losses"] else "others"),
        )
    console.print(table)
    columns = ("model", "stage", "variant", "layers", "rest", "weights", "gradients", "together")
    quotients = ("weights to HFT", "together to HFT")
    table = Table(*columns, *quotients, title="MB gathered and scattered in a step, by the shapes")
    for row, hft in beside_hft(result["computed"]):
        weights = [each["layers"] + each["rest"] for each in (row, hft)]
        together = [weights[0] + row["gradients"], weights[1] + hft["gradients"]]
        numbers = (row["layers"], row["rest"], weights[0], row["gradients"], together[0])
        table.add_row(
            *(row["model"], row["stage"].upper(), row["variant"]),
            *(f"{number / 1e6:,.2f}" for number in numbers),
            *(f"{ours / theirs:.3f}" for ours, theirs in (weights, together)),
        )
    console.print(table)
    memory = {name: f"{number / 1e9:.2f} GB" for name, number in result["frozen_half"].items()}
    console.print(
        f"The frozen half of {SEVEN_B} in bfloat16 on each of {GPUS} GPUs: {memory['sharded']} sharded, "
        f"{memory['whole']} whole."
    )


def beside_hft(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each row, and the one of HFT that differs from it in nothing else."""
    of_hft = {what_is_trained(row): row for row in rows if row["variant"] == "HFT"}
    return ((row, of_hft[what_is_trained(row)]) for row in rows)


def what_is_trained(row: dict[str, Any]) -> tuple:
    return tuple(row.get(key) for key in ("processes", "model", "stage"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], choices=[2, 4, 8])
    parser.add_argument("--stages", nargs="+", default=["sft", "dpo"], choices=["sft", "dpo"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, on stdout")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: it must be at least 1")
    if options.worker is not None:
        work(options)
        return
    result = {
        "counted": [record for processes in options.processes for record in launch(processes, options)],
        "computed": [
            {"model": model, "stage": stage, "variant": variant, **computed(model, variant, stage, bytes_each)}
            for model, bytes_each in (("demo", 4), (SEVEN_B, 2))
            for stage in options.stages
            for variant in VARIANTS
        ],
        "frozen_half": held(SEVEN_B, 2),
        "environment": environment(),
    }
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)


if __name__ == "__main__":
    main()
