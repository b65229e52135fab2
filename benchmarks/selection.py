"""
Time to find the units of a model and to choose among them, on the meta device.

    python benchmarks/selection.py [--repeat 5]

The first row is DeepSeek-V3's shape with a matrix for each expert (about 45,000 units), which transformers itself
fuses into two per layer; the others are classes of transformers with their default configs.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3MLP

from hft_trl import HFTConfig, select
from hft_trl.selection import find_units
from hft_trl.selection.choose import choose


class UnfusedDeepseekV3ForCausalLM(DeepseekV3ForCausalLM):
    """DeepSeek-V3 with one gate, up and down projection for each expert."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        for layer in self.model.layers[config.first_k_dense_replace :]:
            layer.mlp.experts = nn.ModuleList(
                DeepseekV3MLP(config, intermediate_size=config.moe_intermediate_size)
                for _ in range(config.n_routed_experts)
            )


def median_seconds(action: Callable[[], object], repeat: int) -> float:
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="how often each time is taken (the median is shown)")
    repeat = parser.parse_args().repeat
    if repeat < 1:
        parser.error(f"--repeat {repeat}: it must be at least 1")
    torch.set_num_threads(1)
    llama_405b = LlamaConfig(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
    )
    builders: dict[str, Callable[[], PreTrainedModel]] = {
        "DeepSeek-V3, experts not fused": lambda: UnfusedDeepseekV3ForCausalLM(DeepseekV3Config()),
        "DeepSeek-V3": lambda: AutoModelForCausalLM.from_config(DeepseekV3Config()),
        "Llama 3.1 405B": lambda: AutoModelForCausalLM.from_config(llama_405b),
        "Llama 2 7B": lambda: AutoModelForCausalLM.from_config(LlamaConfig()),
    }
    table = Table(title=f"Seconds, median of {repeat}")
    for heading in ("model", "units", "find units", "choose", "select (both)"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, build in builders.items():
        with torch.device("meta"):
            model = build()
        units = find_units(model)
        times = (
            median_seconds(lambda model=model: find_units(model), repeat),
            median_seconds(lambda units=units: choose(units, 0.5, "category", 42), repeat),
            median_seconds(lambda model=model: select(model, HFTConfig()), repeat),
        )
        table.add_row(name, f"{len(units):,}", *(f"{seconds:.3f}" for seconds in times))
    Console().print(table)


if __name__ == "__main__":
    main()
