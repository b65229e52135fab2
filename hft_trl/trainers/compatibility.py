"""Settings that cannot be combined. Each combination is rejected before a model is loaded, where possible."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import ParallelismConfig, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, is_peft_model, parse_flag_from_env
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hft_trl.backends.fsdp import fsdp_version, sharded_by
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError

# Optimizers that update each parameter independently of all others, each of them tested inside of the backward pass
INDEPENDENT = (
    *("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    *("adafactor", "sgd"),
)
FLASH = ("kernels", "flash_attn", "flash_attn_interface")
TENSOR_PARALLEL = ("tp_plan", "tp_size", "distributed_config")
OPTIMIZERS = ("optimizers", "optimizer_cls_and_kwargs")
OTHERS = f"other values of `optim` than {', '.join(f'`{name}`' for name in INDEPENDENT)}"
LARGER = "shard larger models with FSDP2 (accelerate_configs/fsdp2.yaml) or ZeRO-3 (accelerate_configs/zero3.yaml)"
DIVIDES = (
    "{found} divides the whole parameters and gradients that it needs in each process: train in one process or "
    "with DDP, or set "
)


@dataclass(frozen=True)
class Case:
    """What is known of a trainer before it is built."""

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
        return self.hft and (self.config.in_part or (self.after_elements and self.config.reselect != "fresh"))

    @property
    def calibrated(self) -> str | None:
        """The importance that rows are run through the model for."""
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
        """Whether FSDP2 leaves the weights of the other processes empty."""
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
    def parallel(self) -> str:
        """The first size of a parallelism that is above 1, such as `"tp_size 2"`; empty if none is."""
        asked = (self.state or self.args).parallelism_config if self.state or self.args else None
        if asked is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
            asked = ParallelismConfig()  # of the launch configuration
        sizes = {name: vars(asked)[name] for name in ("tp_size", "cp_size", "sp_size")} if asked else {}
        return next((f"{name} {size}" for name, size in sizes.items() if size > 1), "")

    @property
    def spread(self) -> int:
        """GPUs over which TRL would divide a model's layers: it loads with `device_map="auto"` in one process."""
        placed = isinstance(self.given.get("model"), torch.nn.Module) or "device_map" in self.init
        if placed or (self.args is not None and self.args.use_cpu) or torch.cuda.device_count() < 2:
            return 0
        return torch.cuda.device_count() if PartialState().num_processes == 1 else 0

    def asks(self, name: str) -> bool:
        """Whether the trainer's arguments have a setting of this name, and it is on."""
        return self.args is not None and bool(vars(self.args).get(name))

    def stated(self, setting: str) -> str:
        """A setting of [`HFTConfig`] with its value, as an error states it."""
        name = setting.removeprefix("hft.")
        value = vars(self.config)[name]
        if name == "strategy" and self.config.granularity == "column":
            return "hft.granularity is 'column'"
        if name == "strategy" and value != "element":
            return f"hft.reselect is {self.config.reselect!r} after strategy element"
        return f"{setting} is {'true' if value is True else repr(value)}"


When = Callable[[Case], Any]
# (setting, what it cannot be combined with) -> (what is found in a case, message: why and, after a colon, what to do)
Conflicts = dict[tuple[str, str], tuple[When, str]]

# Where a setting of HFTConfig is on; elsewhere its conflicts are not looked at
ON: dict[str, When] = {
    "hft.frozen_dtype": lambda c: c.hft and c.args and c.config.frozen_dtype,
    "hft.frozen_quantization": lambda c: c.hft and c.args and c.config.frozen_quantization,
    "hft.optimizer_in_backward": lambda c: c.args and c.config.optimizer_in_backward,
    "hft.replicate_frozen": lambda c: c.hft and c.config.replicate_frozen,
    "hft.strategy": lambda c: c.elements,
    "hft.importance": lambda c: c.calibrated,
}
STORAGE: Conflicts = {
    ("bf16_full_eval", "method hft"): (
        lambda c: c.hft and c.asks("bf16_full_eval"),
        "bf16_full_eval is true, which casts the whole model when it is evaluated, the frozen half included: set it "
        "to false; with bf16 evaluation computes in that type anyway",
    ),
    ("fp16_full_eval", "method hft"): (
        lambda c: c.hft and c.asks("fp16_full_eval"),
        "fp16_full_eval is true, which casts the whole model when it is evaluated, the frozen half included: set it "
        "to false; with fp16 evaluation computes in that type anyway",
    ),
    ("hft.frozen_dtype", "another mixed precision"): (
        lambda c: c.args.mixed_precision != c.autocast,
        "mixed_precision is {case.args.mixed_precision!r}, which cannot compute with halves of two types: set "
        "{case.autocast} to true, or leave hft.frozen_dtype out",
    ),
    ("hft.frozen_dtype", "DeepSpeed"): (
        lambda c: c.sharded == "DeepSpeed",
        "DeepSpeed holds a model in one type: leave it out; with bf16 DeepSpeed keeps master weights only of what is "
        "trained",
    ),
    ("hft.frozen_dtype", "`precompute_ref_log_probs`"): (
        lambda c: c.asks("precompute_ref_log_probs"),
        "precompute_ref_log_probs uses the reference before its frozen half is rounded: leave one of the two out",
    ),
    ("hft.frozen_quantization", "FSDP2, DeepSpeed"): (
        lambda c: c.sharded,
        "{found} cannot shard quantised matrices: leave it out, or train in one process or with DDP",
    ),
    ("hft.frozen_quantization", "`hft.share_reference: false`"): (
        lambda c: "sync_ref_model" in vars(c.args) and not c.config.share_reference,
        "hft.share_reference is false, so the reference would not be the quantised model that training starts from: "
        "set it to true",
    ),
    ("hft.frozen_quantization", "`sync_ref_model`"): (
        lambda c: c.asks("sync_ref_model"),
        "sync_ref_model moves the reference, which shares the quantised matrices: leave one of the two out",
    ),
    ("hft.frozen_quantization", "`precompute_ref_log_probs`"): (
        lambda c: c.asks("precompute_ref_log_probs"),
        "precompute_ref_log_probs uses the reference before its frozen half is quantised: leave one of the two out",
    ),
    ("hft.optimizer_in_backward", "gradient clipping"): (
        lambda c: (c.args.max_grad_norm or 0) > 0,
        "max_grad_norm is {case.args.max_grad_norm:g}, and clipping needs the norm of all gradients before the first "
        "update: set max_grad_norm to 0",
    ),
    ("hft.optimizer_in_backward", "gradient accumulation"): (
        lambda c: c.args.gradient_accumulation_steps > 1,
        "gradient_accumulation_steps is {case.args.gradient_accumulation_steps}, and gradients that are freed cannot "
        "be added up: set it to 1, with a larger per_device_train_batch_size",
    ),
    ("hft.optimizer_in_backward", "FSDP2, DeepSpeed"): (
        lambda c: c.sharded,
        "{found} keeps gradients itself: leave it out, or train in one process",
    ),
    ("hft.optimizer_in_backward", "several processes or GPUs"): (
        lambda c: (number := max(c.args.world_size, c.args.n_gpu)) > 1 and number,
        "{found} processes or GPUs have to average gradients first: train in one process on one GPU",
    ),
    ("hft.optimizer_in_backward", "`fp16`"): (
        lambda c: c.args.fp16,
        "fp16 scales gradients and inspects them before the update: use bf16, or none",
    ),
    ("hft.optimizer_in_backward", OTHERS): (
        lambda c: (name := OptimizerNames(c.args.optim).value) not in INDEPENDENT and name,
        f"optim is {{found}}, which was not tested with it: use one of {', '.join(INDEPENDENT)}",
    ),
    ("hft.optimizer_in_backward", "an optimizer object"): (
        lambda c: next((n for n in OPTIMIZERS if (c.given.get(n) or (None,))[0] is not None), None),
        "{found} was passed, which may not update each parameter independently: use optim",
    ),
    ("hft.optimizer_in_backward", "`auto_find_batch_size`"): (
        lambda c: c.args.auto_find_batch_size,
        "auto_find_batch_size would repeat a step that is applied in part: set per_device_train_batch_size",
    ),
    ("hft.optimizer_in_backward", "reentrant checkpointing"): (
        lambda c: c.args.gradient_checkpointing and (c.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"),
        "reentrant checkpointing would update what layers share more than once: set use_reentrant to false",
    ),
    ("hft.strategy", "`hft.frozen_dtype`, `hft.frozen_quantization`"): (
        lambda c: next((name for name in ("frozen_dtype", "frozen_quantization") if vars(c.config)[name]), None),
        "it freezes no parameter of the layers as a whole, so hft.{found} would save nothing: leave it out, or choose "
        "another strategy",
    ),
    ("hft.strategy", "`hft.optimizer_in_backward`"): (
        lambda c: c.config.optimizer_in_backward,
        "it puts the frozen elements back after each step of the optimizer, and with hft.optimizer_in_backward there "
        "is one for each parameter: leave it out, or choose another strategy",
    ),
    ("hft.importance", "`fp16`"): (
        lambda c: c.calibrated == "gradient_norm" and c.args and c.args.mixed_precision == "fp16",
        "in fp16 small gradients become 0 without scaling: use bf16, or set hft.importance to weight_norm",
    ),
    ("peft_config", "method hft, or fft of these trainers"): (
        lambda c: (
            c.given.get("peft_config") is not None
            or (isinstance(c.given.get("model"), torch.nn.Module) and is_peft_model(c.given["model"]))
        ),
        "HFT trains the model's own weights, but a peft_config or a PEFT model was passed: drop it, or train the "
        "adapter with TRL's own trainer",
    ),
    ("quantization_config", "method hft, or fft of these trainers"): (
        lambda c: c.given.get("quantization_config") is not None or c.init.get("quantization_config") is not None,
        "HFT trains the model's own weights, but a quantization_config was passed: drop it",
    ),
    ("use_liger_kernel", "a missing package"): (
        lambda c: c.asks("use_liger_kernel") and not find_spec("liger_kernel"),
        "use_liger_kernel is true, which needs a package: run pip install liger-kernel, or leave it out",
    ),
    ("attn_implementation", "a missing package"): (
        lambda c: (
            not any(map(find_spec, FLASH)) and re.match("flash_attention|.*/", c.init.get("attn_implementation") or "")
        ),
        "attn_implementation is {found.string!r}, which needs a package: run pip install kernels, or leave it out",
    ),
}
LAUNCH: Conflicts = {
    ("parallelism_config", "tensor, context and sequence parallelism"): (
        lambda c: c.hft and c.parallel,
        f"parallelism_config has {{found}}, which was not tried with a frozen half: set it to 1, and {LARGER}",
    ),
    ("model_init_kwargs", "`tp_plan`, `tp_size`, `distributed_config`"): (
        lambda c: c.hft and next((name for name in TENSOR_PARALLEL if c.init.get(name) is not None), None),
        f"model_init_kwargs has {{found}}, which divides each matrix over GPUs: drop it, and {LARGER}",
    ),
    ("one process", "several visible GPUs"): (
        lambda c: c.hft and c.spread,
        "{found} GPUs are visible to one process, and TRL would divide the model's layers over them, so that "
        "one GPU works at a time: start one process per GPU with accelerate launch --config_file "
        "accelerate_configs/ddp.yaml (or fsdp2.yaml), or show it one with CUDA_VISIBLE_DEVICES=0",
    ),
    ("fsdp_version", "1"): (
        lambda c: c.hft and c.fsdp == 1,
        "fsdp_version is 1, which flattens trainable and frozen parameters into one: set fsdp_version to 2, as in "
        "accelerate_configs/fsdp2.yaml",
    ),
    ("fsdp_cpu_ram_efficient_loading", "FSDP2"): (
        lambda c: c.hft and c.loads_in_first_process,
        "fsdp_cpu_ram_efficient_loading is true, which leaves the weights of all processes but the first empty, so "
        "they cannot be fingerprinted: set it to false",
    ),
    ("hft.strategy", "FSDP2, DeepSpeed (`element`)"): (
        lambda c: c.sharded,
        DIVIDES + "hft.strategy to category (hft.reselect to fresh)",
    ),
    ("hft.importance", "FSDP2, DeepSpeed (`gradient_norm`, `wanda`)"): (
        lambda c: c.sharded,
        DIVIDES + "hft.importance to weight_norm",
    ),
    ("hft.replicate_frozen", "DeepSpeed"): (
        lambda c: c.sharded == "DeepSpeed",
        "DeepSpeed stores the parameters itself: set it to false, or train under FSDP2, as in "
        "accelerate_configs/fsdp2.yaml",
    ),
}


def check(
    args: TrainingArguments | None,
    config: HFTConfig,
    given: dict[str, Any] | None = None,
    after_elements: bool = False,
    state: AcceleratorState | None = None,
) -> None:
    """Reject settings that cannot be combined. See [`Case`]."""
    case = Case(args, config, given or {}, after_elements, state)
    for (setting, _), (when, message) in (LAUNCH | STORAGE).items():
        if (setting not in ON or ON[setting](case)) and (found := when(case)):
            subject = f"{case.stated(setting)}, but " if setting in ON else ""
            raise HFTError(f"{subject}{message.format(case=case, found=found)}.")
