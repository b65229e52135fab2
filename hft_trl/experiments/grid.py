"""Grid of a frontier: which methods, learning rates, ratios and seeds are trained."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hft_trl.config import Importance, Strategy
from hft_trl.errors import HFTError
from hft_trl.recipe.arguments import key

BASE = "base"
HALVES = {name: {"strategy": name} for name in get_args(Strategy) if name not in ("category", "importance")}
"""Settings of HFT by the suffix of a method, such as `hft:layer`."""
for name in get_args(Importance):
    HALVES[name] = {"strategy": "importance", "importance": name}
    HALVES[f"{name}:least"] = {**HALVES[name], "importance_order": "least"}
HALVES["wanda"] = HALVES.pop("wanda:least")  # what matters most to the source is to stay
HALVES["frozen_embeddings"] = {"train_embeddings": "false", "train_lm_head": "false"}

ADAPTERS = ("lora", "lora:ffn", "oft", "shira")
METHODS = ("fft", "hft", *(f"hft:{half}" for half in HALVES), *ADAPTERS)


@dataclass
class FrontierArguments:
    """Define the grid of a frontier, and what is measured."""

    methods: list[str] = key("Methods, such as fft, hft, hft:layer, lora.", ["fft", "hft"])  # see `METHODS`
    learning_rates: list[str] = key("Learning rates of every method; lora=1e-3 is for LoRA only, instead of them.", [])
    ratios: list[float] = key("Shares of the layers that learn with HFT.", [0.5])
    seeds: int = key("Number of seeds; each decides the half and the order of the rows.", 1)
    average: list[float] = key("Weights of each FFT and HFT model in averages with the base.", [0.25, 0.5, 0.75])
    half_reset: bool = key("Also measure each FFT model with half of it reset to the base.", True)
    kept: Literal["text_loss", "base_kl", "facts"] = key("Figure of retention that decides the front.", "text_loss")
    tasks: str | None = key("Suites of hft-trl evaluate for every model, such as general; they take long.", None)
    lora_rank: int = key("Rank of LoRA, with twice the rank as lora_alpha, and of SHiRA.", 16)
    workers: int | None = key("Processes at a time, by default one per GPU, or per CPU core.", None)

    def __post_init__(self) -> None:
        for name in ("methods", "ratios", "average"):  # twice the same model would count as two seeds
            setattr(self, name, list(dict.fromkeys(vars(self)[name])))
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            raise HFTError(f"methods has {unknown}: the valid ones are {', '.join(METHODS)}.")
        if not self.learning_rates:
            raise HFTError("learning_rates is empty: give at least one, such as 1e-5 3e-5 lora=3e-4.")
        named = [rate.partition("=")[0] for rate in self.learning_rates if "=" in rate]
        if unknown := [name for name in named if name not in METHODS]:
            raise HFTError(f"learning_rates has a rate for {unknown[0]!r}, which is none of {', '.join(METHODS)}.")
        for method in self.methods:
            self.rates(method)
        for name in ("seeds", "workers", "lora_rank"):
            if (value := vars(self)[name]) is not None and value < 1:
                raise HFTError(f"{name} is {value}: it must be at least 1.")
        for name, values in (("ratios", self.ratios), ("average", self.average)):
            wrong = [value for value in values if not 0 < value <= 1]
            if wrong or (name == "ratios" and not values):
                raise HFTError(f"{name} is {values}: each must be above 0 and at most 1.")

    def rates(self, method: str) -> list[str]:
        own = [rate.partition("=")[2] for rate in self.learning_rates if rate.partition("=")[0] == method]
        found = own or [rate for rate in self.learning_rates if "=" not in rate]
        if not found:
            raise HFTError(f"learning_rates has none for {method}: add one, such as 1e-5 or {method}=1e-5.")
        for rate in found:
            if not re.fullmatch(r"\d*\.?\d+([eE][+-]?\d+)?", rate) or not float(rate) > 0:
                raise HFTError(f"learning_rates has {rate!r}: write numbers above 0, such as 3e-5 or lora=3e-4.")
        return list({float(rate): rate for rate in reversed(found)}.values())[::-1]


@dataclass(frozen=True)
class Trial:
    """Store one model to train: a method with its learning rate, ratio and seed."""

    method: str
    learning_rate: str = ""
    ratio: float | None = None
    seed: int = 1

    @property
    def name(self) -> str:
        ratio = "" if self.ratio is None else f"-{self.ratio:g}"
        method = self.method.replace(":", "-")
        return method if method == BASE else f"{method}{ratio}-{self.learning_rate}-{self.seed}"

    def flags(self) -> list[str]:
        kind, _, half = self.method.partition(":")
        # Settings of the stage override those of the run, on the command line and in the file
        words = ["--sft.method", "hft" if kind == "hft" else "fft", "--sft.seed", str(self.seed)]
        words += ["--sft.hft.seed", str(self.seed)]
        if self.learning_rate:
            words += ["--sft.learning_rate", self.learning_rate]
        if self.ratio is not None:
            words += ["--sft.hft.ratio", str(self.ratio)]
        settings: Mapping[str, Any] = HALVES[half] if kind == "hft" and half else {}
        return words + [word for key, value in settings.items() for word in (f"--sft.hft.{key}", value)]


def trials(grid: FrontierArguments) -> list[Trial]:
    """Return the trials of a grid, a seed after the other, so that an early stop leaves complete seeds."""
    return [
        Trial(method, rate, ratio, seed)
        for seed in range(1, grid.seeds + 1)
        for method in grid.methods
        for rate in grid.rates(method)
        for ratio in (grid.ratios if method.startswith("hft") else [None])
    ]
