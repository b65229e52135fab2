"""List settings that cannot be combined, and reject them before a model is loaded."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

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
FLASH = ("kernels", "flash_attn", "flash_attn_interface")
TENSOR_PARALLEL = ("tp_plan", "tp_size", "distributed_config")
# Parts of the names of optimizers whose steps fail on the tensors that FSDP2 shards
UNSHARDED = ("bnb", "adamw_8bit", "paged", "lion", "ademamix", "adafactor", "apollo")
LOW_RANK = ("galore", "apollo")
OTHER_OPTIMIZER = "set it to adamw_torch_fused, or train in one process or with DDP"
OTHERS = f"other values of `optim` than {', '.join(f'`{name}`' for name in INDEPENDENT)}"
LARGER = "shard larger models with FSDP2 (accelerate_configs/fsdp2.yaml) or ZeRO-3 (accelerate_configs/zero3.yaml)"
DIVIDES = (
    "{found} divides the whole parameters and gradients that it needs in each process: train in one process or "
    "with DDP, or set "
)


def reentrant(args: TrainingArguments) -> bool:
    """Whether activation checkpointing is reentrant, which is PyTorch's default if it gets any keyword."""
    keywords = args.activation_checkpointing_kwargs or {}
    passed = keywords.keys() - {"every_n_layers", "offload", "selective"}  # which transformers and TRL take out
    chosen = keywords.get("use_reentrant", True) and not keywords.get("selective")
    return bool(args.activation_checkpointing and passed and chosen)


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
    **{
        (f"{kind}_full_eval", "method hft"): (
            lambda c, kind=kind: c.hft and c.asks(f"{kind}_full_eval"),
            f"{kind}_full_eval is true, which casts the whole model when it is evaluated, the frozen half included: "
            f"set it to false; with {kind} evaluation computes in that type anyway",
        )
        for kind in ("bf16", "fp16")
    },
    ("activation_offloading", "a machine without a GPU"): (
        lambda c: c.asks("activation_offloading") and not torch.accelerator.is_available(),
        "activation_offloading is true, which moves activations from a GPU to main memory, but no GPU is available: "
        "set it to false",
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
        "{found} cannot shard quantized matrices: leave it out, or train in one process or with DDP",
    ),
    ("hft.frozen_quantization", "`hft.share_reference: false`"): (
        lambda c: "sync_ref_model" in vars(c.args) and not c.config.share_reference,
        "hft.share_reference is false, so the reference would not be the quantized model that training starts from: "
        "set it to true",
    ),
    ("hft.frozen_quantization", "`sync_ref_model`"): (
        lambda c: c.asks("sync_ref_model"),
        "sync_ref_model moves the reference, which shares the quantized matrices: leave one of the two out",
    ),
    ("hft.frozen_quantization", "`precompute_ref_log_probs`"): (
        lambda c: c.asks("precompute_ref_log_probs"),
        "precompute_ref_log_probs uses the reference before its frozen half is quantized: leave one of the two out",
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
        lambda c: c.optim not in INDEPENDENT and c.optim,
        f"optim is {{found}}, which was not tested with it: use one of {', '.join(INDEPENDENT)}",
    ),
    ("hft.optimizer_in_backward", "an optimizer object"): (
        lambda c: c.own_optimizer,
        "{found} was passed, which may not update each parameter independently: use optim",
    ),
    ("hft.optimizer_in_backward", "`auto_find_batch_size`"): (
        lambda c: c.args.auto_find_batch_size,
        "auto_find_batch_size would repeat a step that is applied in part: set per_device_train_batch_size",
    ),
    ("hft.optimizer_in_backward", "reentrant checkpointing"): (
        lambda c: reentrant(c.args),
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
    ("hft.importance", "trainers that generate (GRPO, RLOO; `gradient_norm`)"): (
        lambda c: c.calibrated == "gradient_norm" and c.args and "num_generations" in vars(c.args),
        "a trainer that generates computes its loss over all completions of a prompt, not per row: set "
        "hft.importance to weight_norm, snr or wanda",
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
        lambda c: not any(map(find_spec, FLASH)) and c.flash,
        "attn_implementation is {found!r}, which needs a package: run pip install kernels, or leave it out",
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
    ("optim", "FSDP2 (Adafactor, APOLLO, and the optimizers of bitsandbytes)"): (
        lambda c: c.fsdp == 2 and any(part in c.optim for part in UNSHARDED) and c.optim,
        f"optim is {{found}}, whose first step would fail on the tensors that FSDP2 shards: {OTHER_OPTIMIZER}",
    ),
    ("optim", "DeepSpeed (GaLore, APOLLO)"): (
        lambda c: c.sharded == "DeepSpeed" and c.optim.startswith(LOW_RANK) and c.optim,
        f"optim is {{found}}, which needs matrices, and DeepSpeed makes vectors of them: {OTHER_OPTIMIZER}",
    ),
    ("optimizer_cls_and_kwargs", "DeepSpeed (`torch.optim.Muon`)"): (
        lambda c: c.sharded == "DeepSpeed" and torch.optim.Muon in (c.given.get("optimizer_cls_and_kwargs") or ()),
        "torch.optim.Muon needs matrices, and DeepSpeed makes vectors of them: set optim to adamw_torch_fused, or "
        "train in one process, with DDP or under FSDP2",
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
