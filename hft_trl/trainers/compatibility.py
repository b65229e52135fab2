"""Settings that cannot be combined. Each combination is rejected before a model is loaded, where possible."""

from typing import Any

import torch
from accelerate.utils import is_peft_model, parse_flag_from_env
from transformers import TrainingArguments

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.trainers.case import Case, Conflict, elements, gradient, held, hft, inside, quantized

# Optimizers that update each parameter independently of all others, each of them tested inside of the backward pass
INDEPENDENT = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adafactor",
    "sgd",
)
LARGER = "shard larger models with FSDP2 (accelerate_configs/fsdp2.yaml) or ZeRO-3 (accelerate_configs/zero3.yaml)"


DIVIDES = "{case.sharded} divides the whole parameters and gradients that it needs in each process"
STORAGE: tuple[Conflict, ...] = (
    Conflict(
        "bf16_full_eval",
        "method hft",
        hft(lambda c: c.asks("bf16_full_eval")),
        "bf16_full_eval is true, which casts the whole model when it is evaluated, the frozen half included",
        "set it to false; with bf16 evaluation computes in that type anyway",
    ),
    Conflict(
        "fp16_full_eval",
        "method hft",
        hft(lambda c: c.asks("fp16_full_eval")),
        "fp16_full_eval is true, which casts the whole model when it is evaluated, the frozen half included",
        "set it to false; with fp16 evaluation computes in that type anyway",
    ),
    Conflict(
        "hft.frozen_dtype",
        "another mixed precision",
        held(lambda c: c.args.mixed_precision != c.autocast),
        "mixed_precision is {case.args.mixed_precision!r}, which cannot compute with halves of two types",
        "set {case.autocast} to true, or leave hft.frozen_dtype out",
    ),
    Conflict(
        "hft.frozen_dtype",
        "DeepSpeed",
        held(lambda c: c.args.deepspeed_plugin is not None),
        "DeepSpeed holds a model in one type",
        "leave it out; with bf16 DeepSpeed keeps master weights only of what is trained",
    ),
    Conflict(
        "hft.frozen_dtype",
        "`precompute_ref_log_probs`",
        held(lambda c: c.asks("precompute_ref_log_probs")),
        "precompute_ref_log_probs computes with the reference before its frozen half is rounded",
        "leave one of the two out",
    ),
    Conflict(
        "hft.frozen_quantization",
        "FSDP2, DeepSpeed",
        quantized(lambda c: c.sharded),
        "{case.sharded} cannot shard quantised matrices",
        "leave it out, or train in one process or with DDP",
    ),
    Conflict(
        "hft.frozen_quantization",
        "`hft.share_reference: false`",
        quantized(lambda c: "sync_ref_model" in vars(c.args) and not c.config.share_reference),
        "hft.share_reference is false, so the reference would not be the quantised model that training starts from",
        "set it to true",
    ),
    Conflict(
        "hft.frozen_quantization",
        "`sync_ref_model`",
        quantized(lambda c: c.asks("sync_ref_model")),
        "sync_ref_model moves the reference, which shares the quantised matrices",
        "leave one of the two out",
    ),
    Conflict(
        "hft.frozen_quantization",
        "`precompute_ref_log_probs`",
        quantized(lambda c: c.asks("precompute_ref_log_probs")),
        "precompute_ref_log_probs computes with the reference before its frozen half is quantised",
        "leave one of the two out",
    ),
    Conflict(
        "hft.optimizer_in_backward",
        "gradient clipping",
        inside(lambda c: (c.args.max_grad_norm or 0) > 0),
        "max_grad_norm is {case.args.max_grad_norm:g}, and clipping needs the norm of all gradients before the first "
        "update",
        "set max_grad_norm to 0",
    ),
    Conflict(
        "hft.optimizer_in_backward",
        "gradient accumulation",
        inside(lambda c: c.args.gradient_accumulation_steps > 1),
        "gradient_accumulation_steps is {case.args.gradient_accumulation_steps}, and gradients that are freed cannot "
        "be added up",
        "set it to 1, with a larger per_device_train_batch_size",
    ),
    Conflict(
        "hft.optimizer_in_backward",
        "FSDP2, DeepSpeed",
        inside(lambda c: c.sharded),
        "{case.sharded} keeps gradients itself",
        "leave it out, or train in one process",
    ),
    Conflict(
        "hft.optimizer_in_backward",
        "several processes or GPUs",
        inside(lambda c: c.devices > 1),
        "there are {case.devices} processes or GPUs, whose gradients have to be averaged first",
        "train in one process on one GPU",
    ),
    Conflict(
        "hft.optimizer_in_backward",
        "`fp16`",
        inside(lambda c: c.args.fp16),
        "fp16 scales gradients and inspects them before the update",
        "use bf16, or none",
    ),
    Conflict(
        "hft.optimizer_in_backward",
        "other values of `optim` than " + ", ".join(f"`{name}`" for name in INDEPENDENT),
        inside(lambda c: c.optim not in INDEPENDENT),
        "optim is {case.optim}, which was not tested with it",
        f"use one of {', '.join(INDEPENDENT)}",
    ),
    Conflict(
        "hft.optimizer_in_backward",
        "an optimizer object",
        lambda c: c.config.optimizer_in_backward and c.own_optimizer,
        "{case.own_optimizer} was passed, which may not update each parameter independently",
        "use optim",
    ),
    Conflict(
        "hft.optimizer_in_backward",
        "`auto_find_batch_size`",
        inside(lambda c: c.args.auto_find_batch_size),
        "auto_find_batch_size would repeat a step that is applied in part",
        "set per_device_train_batch_size",
    ),
    Conflict(
        "hft.optimizer_in_backward",
        "reentrant checkpointing",
        inside(
            lambda c: (
                c.args.gradient_checkpointing and (c.args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
            )
        ),
        "reentrant checkpointing would update what several layers share more than once",
        "set use_reentrant to false",
    ),
    Conflict(
        "hft.strategy",
        "`hft.frozen_dtype`",
        elements(lambda c: c.config.frozen_dtype),
        "it freezes no parameter of the layers as a whole, so hft.frozen_dtype would save nothing",
        "leave it out, or choose another strategy",
    ),
    Conflict(
        "hft.strategy",
        "`hft.frozen_quantization`",
        elements(lambda c: c.config.frozen_quantization),
        "it freezes no parameter of the layers as a whole, so hft.frozen_quantization would save nothing",
        "leave it out, or choose another strategy",
    ),
    Conflict(
        "hft.strategy",
        "`hft.optimizer_in_backward`",
        elements(lambda c: c.config.optimizer_in_backward),
        "it puts the frozen elements back after each step of the optimizer, and with hft.optimizer_in_backward there "
        "is one for each parameter",
        "leave it out, or choose another strategy",
    ),
    Conflict(
        "hft.importance",
        "`fp16`",
        gradient(lambda c: c.args is not None and c.args.mixed_precision == "fp16"),
        "in fp16 small gradients become 0 without the scaling of a training step",
        "use bf16, or set hft.importance to weight_norm",
    ),
    Conflict(
        "peft_config",
        "method hft, or fft of these trainers",
        lambda c: (
            c.given.get("peft_config") is not None
            or (isinstance(c.given.get("model"), torch.nn.Module) and is_peft_model(c.given["model"]))
        ),
        "HFT trains the model's own weights, but a peft_config or a PEFT model was passed",
        "drop it, or train the adapter with TRL's own trainer",
    ),
    Conflict(
        "quantization_config",
        "method hft, or fft of these trainers",
        lambda c: c.given.get("quantization_config") is not None or c.init.get("quantization_config") is not None,
        "HFT trains the model's own weights, but a quantization_config was passed",
        "drop it",
    ),
)
LAUNCH: tuple[Conflict, ...] = (
    Conflict(
        "parallelism_config",
        "tensor, context and sequence parallelism",
        hft(lambda c: c.parallel),
        "parallelism_config has {case.parallel}, which was not tried with a frozen half",
        f"set it to 1, and {LARGER}",
    ),
    Conflict(
        "model_init_kwargs",
        "`tp_plan`, `tp_size`, `distributed_config`",
        hft(lambda c: c.tensor_parallel),
        "model_init_kwargs has {case.tensor_parallel}, which divides each matrix over GPUs",
        f"drop it, and {LARGER}",
    ),
    Conflict(
        "one process",
        "several visible GPUs",
        hft(lambda c: c.spread),
        "{case.spread} GPUs are visible to one process, and TRL would divide the model's layers over them, so that "
        "one GPU works at a time",
        "start one process per GPU with accelerate launch --config_file accelerate_configs/ddp.yaml (or fsdp2.yaml), "
        "or show it one with CUDA_VISIBLE_DEVICES=0",
    ),
    Conflict(
        "fsdp_version",
        "1",
        hft(lambda c: c.fsdp == 1),
        "fsdp_version is 1, which flattens trainable and frozen parameters into one",
        "set fsdp_version to 2, as in accelerate_configs/fsdp2.yaml",
    ),
    # transformers writes it into the environment too where the trainer's arguments ask for FSDP
    Conflict(
        "fsdp_cpu_ram_efficient_loading",
        "FSDP2",
        hft(lambda c: c.fsdp == 2 and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")),
        "fsdp_cpu_ram_efficient_loading is true, which leaves the weights of all processes but the first empty, so "
        "they cannot be fingerprinted",
        "set it to false",
    ),
    Conflict(
        "hft.strategy",
        "FSDP2, DeepSpeed (`element`)",
        elements(lambda c: c.sharded),
        DIVIDES,
        "train in one process or with DDP, or set hft.strategy to category (hft.reselect to fresh)",
    ),
    Conflict(
        "hft.importance",
        "FSDP2, DeepSpeed (`gradient_norm`)",
        gradient(lambda c: c.sharded),
        DIVIDES,
        "train in one process or with DDP, or set hft.importance to weight_norm",
    ),
    Conflict(
        "hft.replicate_frozen",
        "DeepSpeed",
        hft(lambda c: c.config.replicate_frozen and c.args is not None and c.args.deepspeed_plugin is not None),
        "DeepSpeed stores the parameters itself",
        "set it to false, or train under FSDP2, as in accelerate_configs/fsdp2.yaml",
    ),
)


def check(
    args: TrainingArguments | None,
    config: HFTConfig,
    given: dict[str, Any] | None = None,
    after_elements: bool = False,
) -> None:
    """
    Reject settings that cannot be combined. See [`Case`] for the arguments.

    Raises:
        [`HFTError`]: Naming the settings, and what to use instead.
    """
    case = Case(args, config, given or {}, after_elements)
    for conflict in (*LAUNCH, *STORAGE):
        if conflict.when(case):
            message = f"{conflict.because}: {conflict.remedy}.".format(case=case)
            ours = conflict.setting.startswith("hft.")
            raise HFTError(f"{case.stated(conflict.setting)}, but {message}" if ours else message)
