"""
Time and memory of a training step, full against half fine-tuning, interleaved in one process.

```bash
python benchmarks/train_step.py                    # what the machine has, a small Llama
python benchmarks/train_step.py --hidden 2048 --layers 16 --batch 8 --length 1024
```

Each round runs one step of either method, in turn, so that whatever else the machine does falls on both alike; the
figures are medians over the rounds. Gradient checkpointing is measured on and off.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from hft_trl import HFTConfig, select
from hft_trl.report import environment


class Run:
    """A model with its optimizer, ready for one step after another."""

    def __init__(self, method: str, checkpointing: bool, options: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=options.vocab,
                hidden_size=options.hidden,
                intermediate_size=options.hidden * 8 // 3,
                num_hidden_layers=options.layers,
                num_attention_heads=options.hidden // 64,
                max_position_embeddings=options.length,
                use_cache=False,
            )
        ).to(device)
        self.model.train()
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        select(self.model, HFTConfig(method=method)).apply(self.model)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)
        self.tokens = torch.randint(0, options.vocab, (options.batch, options.length), device=device)
        self.bf16 = device.type == "cuda"
        self.seconds: list[float] = []
        self.saved_bytes = 0

    def step(self) -> None:
        start = time.perf_counter()
        with torch.autocast(self.tokens.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.bf16:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)

    def measure_saved(self) -> None:
        """Bytes that the forward pass keeps for the backward pass, parameters left out; each storage counts once."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
            self.saved_bytes = sum(kept.values())
            loss.backward()
        self.optimizer.zero_grad()

    @property
    def state_bytes(self) -> int:
        values = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return sum(value.numel() * value.element_size() for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("hidden", 384),
        ("layers", 8),
        ("vocab", 8192),
        ("batch", 4),
        ("length", 128),
        ("rounds", 12),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = {(m, c): Run(m, c, options, device) for c in (False, True) for m in ("fft", "hft")}
    for run in runs.values():
        run.step()
        run.measure_saved()
        run.seconds.clear()
    for _ in range(options.rounds):
        for run in runs.values():
            run.step()

    table = Table("method", "checkpointing", "step", "to FFT", "activations", "optimizer")
    for (method, checkpointing), run in runs.items():
        median = statistics.median(run.seconds)
        table.add_row(
            method,
            "on" if checkpointing else "off",
            f"{median:.3f} s",
            f"{median / statistics.median(runs['fft', checkpointing].seconds):.2f}",
            f"{run.saved_bytes / 1e6:.0f} MB",
            f"{run.state_bytes / 1e6:.0f} MB",
        )
    Console().print(table)
    Console().print(environment())


if __name__ == "__main__":
    main()
