"""Describe a trainer before it is built, in the terms that settings are checked by."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import ParallelismConfig, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hft_trl.backends.fsdp import fsdp_version, sharded_by
from hft_trl.config import HFTConfig


@dataclass(frozen=True)
class Case:
    """Describe a trainer before it is built."""

    args: TrainingArguments | None  # `None` for the trainer's defaults
    config: HFTConfig
    given: dict[str, Any]  # the other arguments of the trainer, by name
    after_elements: bool = False  # whether single elements learned in the stage before, which `reselect` may keep
    state: AcceleratorState | None = None  # the backend, once an accelerator exists

    @property
    def hft(self) -> bool:
        return self.config.method == "hft"

    @property
    def elements(self) -> bool:
        return self.hft and (
            self.config.strategy == "element" or (self.after_elements and self.config.reselect != "fresh")
        )

    @property
    def calibrated(self) -> str | None:
        """Return the importance that needs rows of data, `None` for the others."""
        return None if self.elements else self.config.calibrated

    @cached_property
    def sharded(self) -> str | None:
        return sharded_by(self.args)

    @property
    def fsdp(self) -> int | None:
        if self.state is None:
            return fsdp_version(self.args)
        return self.state.fsdp_plugin.fsdp_version if self.state.distributed_type == DistributedType.FSDP else None

    @property
    def loads_in_first_process(self) -> bool:
        """Return whether FSDP2 leaves the weights of the other processes empty."""
        # transformers and accelerate set this variable too
        return self.fsdp == 2 and bool(parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"))

    @property
    def autocast(self) -> str:
        return {"bfloat16": "bf16", "float16": "fp16", None: "no"}[self.config.frozen_dtype]

    @property
    def init(self) -> dict[str, Any]:
        init = vars(self.args).get("model_init_kwargs") if self.args is not None else None
        return init if isinstance(init, dict) else {}

    @property
    def flash(self) -> str | None:
        """Return the attention implementation that needs a package, of the model or of a part of it."""
        asked = self.init.get("attn_implementation")
        names = asked.values() if isinstance(asked, dict) else [asked]
        return next((name for name in names if name and re.match("flash_attention|.*/", name)), None)

    @property
    def parallel(self) -> str:
        """Return the first parallel size above 1, such as `"tp_size 2"`; empty if there is none."""
        asked = (self.state or self.args).parallelism_config if self.state or self.args else None
        if asked is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
            asked = ParallelismConfig()  # of the launch configuration
        sizes = {name: vars(asked)[name] for name in ("tp_size", "cp_size", "sp_size")} if asked else {}
        return next((f"{name} {size}" for name, size in sizes.items() if size > 1), "")

    @property
    def spread(self) -> int:
        """Return the number of GPUs over which TRL would divide a model's layers in one process."""
        placed = isinstance(self.given.get("model"), torch.nn.Module) or "device_map" in self.init
        if placed or (self.args is not None and self.args.use_cpu) or torch.cuda.device_count() < 2:
            return 0
        return torch.cuda.device_count() if PartialState().num_processes == 1 else 0

    @property
    def own_optimizer(self) -> str | None:
        """Return the argument that passes an optimizer, which is used instead of `optim`."""
        names = ("optimizers", "optimizer_cls_and_kwargs")
        return next((name for name in names if (self.given.get(name) or (None,))[0] is not None), None)

    @property
    def optim(self) -> str:
        """Return the name of the optimizer; empty if one is passed."""
        return OptimizerNames(self.args.optim).value if self.args and not self.own_optimizer else ""

    def asks(self, name: str) -> bool:
        """Return whether the trainer's arguments have a setting of this name that is on."""
        return self.args is not None and bool(vars(self.args).get(name))

    def stated(self, setting: str) -> str:
        """Return a setting of [`HFTConfig`] with its value, for an error."""
        name = setting.removeprefix("hft.")
        value = vars(self.config)[name]
        if name == "strategy" and value != "element":
            return f"hft.reselect is {self.config.reselect!r} after strategy element"
        return f"{setting} is {'true' if value is True else repr(value)}"
