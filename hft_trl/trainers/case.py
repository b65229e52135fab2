"""What is known of a trainer before it is built, in the words that settings are checked by."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hft_trl.backends.fsdp import fsdp_version, parallel_sizes, sharded_by
from hft_trl.config import HFTConfig

AUTOCAST = {"bfloat16": "bf16", "float16": "fp16", None: "no"}


@dataclass(frozen=True)
class Case:
    """
    What is known of a trainer before it is built.

    Attributes:
        args ([`~transformers.TrainingArguments`], *optional*): The trainer's arguments, `None` for its defaults.
        config ([`HFTConfig`]): What to train, and how it is stored.
        given (`dict[str, Any]`): The other arguments of the trainer, by name.
        after_elements (`bool`): Whether single elements learned in the stage before, which `reselect` may keep.
    """

    args: TrainingArguments | None
    config: HFTConfig
    given: dict[str, Any]
    after_elements: bool = False

    @cached_property
    def elements(self) -> bool:
        """Whether single elements are frozen."""
        return self.config.strategy == "element" or (self.after_elements and self.config.reselect != "fresh")

    @cached_property
    def sharded(self) -> str | None:
        """Name of the backend that shards the parameters."""
        return sharded_by(self.args)

    @cached_property
    def fsdp(self) -> int | None:
        """Version of FSDP."""
        return fsdp_version(self.args)

    @cached_property
    def autocast(self) -> str:
        """Mixed precision of the type that `frozen_dtype` names."""
        return AUTOCAST[self.config.frozen_dtype]

    @cached_property
    def optim(self) -> str:
        return OptimizerNames(self.args.optim).value

    @cached_property
    def devices(self) -> int:
        """Processes or GPUs of one process."""
        return max(self.args.world_size, self.args.n_gpu)

    @cached_property
    def init(self) -> dict[str, Any]:
        """`model_init_kwargs`."""
        init = vars(self.args).get("model_init_kwargs") if self.args is not None else None
        return init if isinstance(init, dict) else {}

    @cached_property
    def parallel(self) -> str:
        """The first size of a parallelism that is above 1, such as `"tp_size 2"`; empty if there is none."""
        asked = self.args.parallelism_config if self.args is not None else None
        if asked is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
            asked = ParallelismConfig()  # of the launch configuration
        return next((f"{name} {size}" for name, size in parallel_sizes(asked).items() if size > 1), "")

    @cached_property
    def tensor_parallel(self) -> str:
        return next((n for n in ("tp_plan", "tp_size", "distributed_config") if self.init.get(n) is not None), "")

    @cached_property
    def spread(self) -> int:
        """
        GPUs over which TRL would divide a model's layers.

        A process that is alone loads with `device_map="auto"`.
        """
        placed = isinstance(self.given.get("model"), torch.nn.Module) or "device_map" in self.init
        if placed or (self.args is not None and self.args.use_cpu) or torch.cuda.device_count() < 2:
            return 0
        return torch.cuda.device_count() if PartialState().num_processes == 1 else 0

    @cached_property
    def own_optimizer(self) -> str:
        """The argument that gives an optimizer of the user's."""
        given = {name: self.given.get(name) for name in ("optimizers", "optimizer_cls_and_kwargs")}
        return next((name for name, value in given.items() if value is not None and next(iter(value)) is not None), "")

    def asks(self, name: str) -> bool:
        """Whether the trainer's arguments have a setting of this name, and it is on."""
        return self.args is not None and bool(vars(self.args).get(name))

    def stated(self, setting: str) -> str:
        """A setting of [`HFTConfig`] with its value, as an error states it."""
        if setting == "hft.strategy" and self.elements and self.config.strategy != "element":
            return f"hft.reselect is {self.config.reselect!r} after strategy element"
        if setting in ("hft.strategy", "hft.importance"):
            return f"{setting} is {vars(self.config)[setting.removeprefix('hft.')]!r}"
        value = vars(self.config)[setting.removeprefix("hft.")]
        return f"{setting} is {str(value).lower() if isinstance(value, bool) else value}"


When = Callable[[Case], Any]
"""Whether a case has a combination of settings."""


class Conflict(NamedTuple):
    """
    A combination that is rejected.

    Args:
        setting (`str`): The setting, of `HFTConfig` with `hft.` in front; else what the user passed.
        beside (`str`): What it cannot be combined with, as the documentation names it.
        when (`Callable`): Whether a case has the combination.
        because (`str`): Why, with fields of the case in braces.
        remedy (`str`): What to do.
    """

    setting: str
    beside: str
    when: When
    because: str
    remedy: str


def hft(when: When) -> When:
    """Restrict a condition to method hft."""
    return lambda case: case.config.method == "hft" and when(case)


def held(when: When) -> When:
    """Restrict a condition to `frozen_dtype`."""
    return hft(lambda case: case.args is not None and case.config.frozen_dtype and when(case))


def quantized(when: When) -> When:
    """Restrict a condition to `frozen_quantization`."""
    return hft(lambda case: case.args is not None and case.config.frozen_quantization and when(case))


def elements(when: When) -> When:
    """Restrict a condition to frozen single elements."""
    return hft(lambda case: case.elements and when(case))


def gradient(when: When) -> When:
    """Restrict a condition to importance by gradients."""
    return hft(lambda case: case.config.by_gradient and not case.elements and when(case))


def inside(when: When) -> When:
    """Restrict a condition to `optimizer_in_backward`."""
    return lambda case: case.args is not None and case.config.optimizer_in_backward and when(case)
