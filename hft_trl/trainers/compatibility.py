"""Settings that cannot be combined. Each combination is rejected before a model is loaded, where possible."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import is_peft_model
from transformers import TrainingArguments

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.trainers.case import Case

# Optimizers that update each parameter independently of all others, each of them tested inside of the backward pass
INDEPENDENT = (
    *("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    *("adafactor", "sgd"),
)
LARGER = "shard larger models with FSDP2 (accelerate_configs/fsdp2.yaml) or ZeRO-3 (accelerate_configs/zero3.yaml)"
DIVIDES = (
    "{case.sharded} divides the whole parameters and gradients that it needs in each process: train in one process or "
    "with DDP, or set "
)


When = Callable[[Case], Any]


class Conflict(NamedTuple):
    """A combination that is rejected."""

    setting: str  # of HFTConfig with "hft." in front; else what the user passed
    beside: str  # what it cannot be combined with, as the documentation names it
    when: When
    message: str  # why, a colon, and what to do, with fields of the case in braces

    @property
    def remedy(self) -> str:
        return self.message.partition(": ")[2]


def of(setting: str, on: When, *rows: tuple[str, When, str]) -> list[Conflict]:
    """Return the conflicts of one setting, which are checked where it is `on`."""
    return [
        Conflict(setting, beside, lambda case, when=when: on(case) and when(case), message)
        for beside, when, message in rows
    ]


STORAGE: tuple[Conflict, ...] = (
    *(
        Conflict(
            f"{dtype}_full_eval",
            "method hft",
            lambda c, dtype=dtype: c.hft and c.asks(f"{dtype}_full_eval"),
            f"{dtype}_full_eval is true, which casts the whole model when it is evaluated, the frozen half included: "
            f"set it to false; with {dtype} evaluation computes in that type anyway",
        )
        for dtype in ("bf16", "fp16")
    ),
    *of(
        "hft.frozen_dtype",
        lambda c: c.hft and c.args and c.config.frozen_dtype,
        (
            "another mixed precision",
            lambda c: c.args.mixed_precision != c.autocast,
            "mixed_precision is {case.args.mixed_precision!r}, which cannot compute with halves of two types: set "
            "{case.autocast} to true, or leave hft.frozen_dtype out",
        ),
        (
            "DeepSpeed",
            lambda c: c.sharded == "DeepSpeed",
            "DeepSpeed holds a model in one type: leave it out; with bf16 DeepSpeed keeps master weights only of "
            "what is trained",
        ),
        (
            "`precompute_ref_log_probs`",
            lambda c: c.asks("precompute_ref_log_probs"),
            "precompute_ref_log_probs uses the reference before its frozen half is rounded: leave one of the two out",
        ),
    ),
    *of(
        "hft.frozen_quantization",
        lambda c: c.hft and c.args and c.config.frozen_quantization,
        (
            "FSDP2, DeepSpeed",
            lambda c: c.sharded,
            "{case.sharded} cannot shard quantised matrices: leave it out, or train in one process or with DDP",
        ),
        (
            "`hft.share_reference: false`",
            lambda c: "sync_ref_model" in vars(c.args) and not c.config.share_reference,
            "hft.share_reference is false, so the reference would not be the quantised model that training starts "
            "from: set it to true",
        ),
        (
            "`sync_ref_model`",
            lambda c: c.asks("sync_ref_model"),
            "sync_ref_model moves the reference, which shares the quantised matrices: leave one of the two out",
        ),
        (
            "`precompute_ref_log_probs`",
            lambda c: c.asks("precompute_ref_log_probs"),
            "precompute_ref_log_probs uses the reference before that is quantised: leave one of the two out",
        ),
    ),
    *of(
        "hft.optimizer_in_backward",
        lambda c: c.args and c.config.optimizer_in_backward,
        (
            "gradient clipping",
            lambda c: (c.args.max_grad_norm or 0) > 0,
            "max_grad_norm is {case.args.max_grad_norm:g}, and clipping needs the norm of all gradients before the "
            "first update: set max_grad_norm to 0",
        ),
        (
            "gradient accumulation",
            lambda c: c.args.gradient_accumulation_steps > 1,
            "gradient_accumulation_steps is {case.args.gradient_accumulation_steps}, and gradients that are freed "
            "cannot be added up: set it to 1, with a larger per_device_train_batch_size",
        ),
        (
            "FSDP2, DeepSpeed",
            lambda c: c.sharded,
            "{case.sharded} keeps gradients itself: leave it out, or train in one process",
        ),
        (
            "several processes or GPUs",
            lambda c: c.devices > 1,
            "{case.devices} processes or GPUs have to average gradients first: train in one process on one GPU",
        ),
        (
            "`fp16`",
            lambda c: c.args.fp16,
            "fp16 scales gradients and inspects them before the update: use bf16, or none",
        ),
        (
            "other values of `optim` than " + ", ".join(f"`{name}`" for name in INDEPENDENT),
            lambda c: c.optim not in INDEPENDENT,
            f"optim is {{case.optim}}, which was not tested with it: use one of {', '.join(INDEPENDENT)}",
        ),
        (
            "an optimizer object",
            lambda c: c.own_optimizer,
            "{case.own_optimizer} was passed, which may not update each parameter independently: use optim",
        ),
        (
            "`auto_find_batch_size`",
            lambda c: c.args.auto_find_batch_size,
            "auto_find_batch_size would repeat a step that is applied in part: set per_device_train_batch_size",
        ),
        (
            "reentrant checkpointing",
            lambda c: (
                c.args.gradient_checkpointing and (c.args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
            ),
            "reentrant checkpointing would update what layers share more than once: set use_reentrant to false",
        ),
    ),
    *of(
        "hft.strategy",
        lambda c: c.elements,
        (
            "`hft.frozen_dtype`, `hft.frozen_quantization`",
            lambda c: c.held_smaller,
            "it freezes no parameter of the layers as a whole, so {case.held_smaller} would save nothing: leave it "
            "out, or choose another strategy",
        ),
        (
            "`hft.optimizer_in_backward`",
            lambda c: c.config.optimizer_in_backward,
            "it puts the frozen elements back after each step of the optimizer, and with hft.optimizer_in_backward "
            "there is one for each parameter: leave it out, or choose another strategy",
        ),
    ),
    Conflict(
        "hft.importance",
        "`fp16`",
        lambda c: c.gradients and c.args and c.args.mixed_precision == "fp16",
        "in fp16 small gradients become 0 without scaling: use bf16, or set hft.importance to weight_norm",
    ),
    Conflict(
        "peft_config",
        "method hft, or fft of these trainers",
        lambda c: (
            c.given.get("peft_config") is not None
            or (isinstance(c.given.get("model"), torch.nn.Module) and is_peft_model(c.given["model"]))
        ),
        "HFT trains the model's own weights, but a peft_config or a PEFT model was passed: drop it, or train the "
        "adapter with TRL's own trainer",
    ),
    Conflict(
        "quantization_config",
        "method hft, or fft of these trainers",
        lambda c: c.given.get("quantization_config") is not None or c.init.get("quantization_config") is not None,
        "HFT trains the model's own weights, but a quantization_config was passed: drop it",
    ),
)
LAUNCH: tuple[Conflict, ...] = (
    Conflict(
        "parallelism_config",
        "tensor, context and sequence parallelism",
        lambda c: c.hft and c.parallel,
        f"parallelism_config has {{case.parallel}}, which was not tried with a frozen half: set it to 1, and {LARGER}",
    ),
    Conflict(
        "model_init_kwargs",
        "`tp_plan`, `tp_size`, `distributed_config`",
        lambda c: c.hft and c.tensor_parallel,
        f"model_init_kwargs has {{case.tensor_parallel}}, which divides each matrix over GPUs: drop it, and {LARGER}",
    ),
    Conflict(
        "one process",
        "several visible GPUs",
        lambda c: c.hft and c.spread,
        "{case.spread} GPUs are visible to one process, and TRL would divide the model's layers over them, so that "
        "one GPU works at a time: start one process per GPU with accelerate launch --config_file "
        "accelerate_configs/ddp.yaml (or fsdp2.yaml), or show it one with CUDA_VISIBLE_DEVICES=0",
    ),
    Conflict(
        "fsdp_version",
        "1",
        lambda c: c.hft and c.fsdp == 1,
        "fsdp_version is 1, which flattens trainable and frozen parameters into one: set fsdp_version to 2, as in "
        "accelerate_configs/fsdp2.yaml",
    ),
    Conflict(
        "fsdp_cpu_ram_efficient_loading",
        "FSDP2",
        lambda c: c.hft and c.loads_in_first_process,
        "fsdp_cpu_ram_efficient_loading is true, which leaves the weights of all processes but the first empty, so "
        "they cannot be fingerprinted: set it to false",
    ),
    Conflict(
        "hft.strategy",
        "FSDP2, DeepSpeed (`element`)",
        lambda c: c.elements and c.sharded,
        DIVIDES + "hft.strategy to category (hft.reselect to fresh)",
    ),
    Conflict(
        "hft.importance",
        "FSDP2, DeepSpeed (`gradient_norm`)",
        lambda c: c.gradients and c.sharded,
        DIVIDES + "hft.importance to weight_norm",
    ),
    Conflict(
        "hft.replicate_frozen",
        "DeepSpeed",
        lambda c: c.hft and c.config.replicate_frozen and c.sharded == "DeepSpeed",
        "DeepSpeed stores the parameters itself: set it to false, or train under FSDP2, as in "
        "accelerate_configs/fsdp2.yaml",
    ),
)


def check(
    args: TrainingArguments | None,
    config: HFTConfig,
    given: dict[str, Any] | None = None,
    after_elements: bool = False,
    state: AcceleratorState | None = None,
) -> None:
    """Reject settings that cannot be combined, with an [`HFTError`]. See [`Case`] for the arguments."""
    case = Case(args, config, given or {}, after_elements, state)
    for conflict in (*LAUNCH, *STORAGE):
        if conflict.when(case):
            message = f"{conflict.message}.".format(case=case)
            ours = conflict.setting.startswith("hft.")
            raise HFTError(f"{case.stated(conflict.setting)}, but {message}" if ours else message)
