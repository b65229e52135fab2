"""What can't be had together with HFT, or with some of its settings: each is refused as soon as it is known."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import OptimizerNames

from hft_trl.backends.fsdp import sharded_by
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.reference import moving
from hft_trl.weights import named_parameters

# Optimizers that treat each parameter apart from all others, each of them tested inside of the backward pass.
APART = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adafactor",
    "sgd",
)


def check_settings(args: TrainingArguments, hft_config: HFTConfig) -> None:
    """
    Refuse settings of HFT that a trainer's arguments stand against, before a model is loaded.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The trainer's arguments.
        hft_config ([`HFTConfig`]):
            What to train, and how it is stored.

    Raises:
        [`HFTError`]: Naming the setting to change.
    """
    moving.check(args)
    if hft_config.method == "hft":
        check_never_cast(args)
    if hft_config.frozen_dtype and hft_config.method == "hft":
        check_frozen_dtype(args, hft_config.frozen_dtype)
    if hft_config.frozen_quantization and hft_config.method == "hft":
        check_frozen_quantization(args, hft_config)
    if hft_config.optimizer_in_backward:
        check_optimizer_in_backward(args)


def check_never_cast(args: TrainingArguments) -> None:
    """
    Reject an evaluation that casts the model itself, after which the frozen half would not hold its bits any more.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The trainer's arguments.

    Raises:
        [`HFTError`]: Naming the setting to change.
    """
    for full_eval, autocast in (("bf16_full_eval", "bf16"), ("fp16_full_eval", "fp16")):
        if vars(args).get(full_eval):
            raise HFTError(
                f"{full_eval} is true, which casts the whole model when it is evaluated, the frozen half included: set it to false. "
                f"With {autocast} evaluation computes in that type anyway, and the weights stay as they are."
            )


def check_frozen_dtype(args: TrainingArguments, frozen_dtype: str) -> None:
    """
    Refuse to hold the frozen half in a type of its own where the halves could not be computed with together, or where the
    reference would be another model.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The trainer's arguments.
        frozen_dtype (`str`):
            `"bfloat16"` or `"float16"`.

    Raises:
        [`HFTError`]: Naming the setting to change.
    """
    needed = {"bfloat16": "bf16", "float16": "fp16"}[frozen_dtype]
    if args.mixed_precision != needed:
        raise HFTError(
            f"hft.frozen_dtype is {frozen_dtype}, but mixed_precision is {args.mixed_precision!r}, so the two halves could not "
            f"be computed with together: set {needed} to true, or leave hft.frozen_dtype out."
        )
    if args.deepspeed_plugin is not None:
        raise HFTError(
            f"hft.frozen_dtype is {frozen_dtype}, but DeepSpeed holds a model in one type: leave it out. With bf16, DeepSpeed "
            "keeps master weights of what is trained only, so the frozen half takes 2 bytes each anyway."
        )
    if vars(args).get("precompute_ref_log_probs"):  # TRL computes them before the half is known
        raise HFTError(
            f"hft.frozen_dtype is {frozen_dtype}, but precompute_ref_log_probs computes with the reference before its frozen "
            "half is rounded, so it would not be the policy's: leave one of the two out."
        )


def check_choice(args: TrainingArguments | None, hft_config: HFTConfig, after_elements: bool = False) -> None:
    """
    Refuse a way to choose the half that can't be had together with the backend or with another setting.

    Args:
        args ([`~transformers.TrainingArguments`], *optional*):
            The trainer's arguments.
        hft_config ([`HFTConfig`]):
            What to train.
        after_elements (`bool`, *optional*, defaults to `False`):
            Whether single elements learned in the stage before, which `reselect` may keep.

    Raises:
        [`HFTError`]: Naming the settings, and what to use instead.
    """
    kept = after_elements and hft_config.reselect != "fresh"
    elements = kept or hft_config.strategy == "element"
    if hft_config.method != "hft" or not (elements or hft_config.by_gradient):
        return
    if kept:
        what, remedy = f"hft.reselect is {hft_config.reselect!r} after strategy element", "hft.reselect to fresh"
    elif elements:
        what, remedy = "hft.strategy is 'element'", "hft.strategy to category"
    else:
        what, remedy = "hft.importance is 'gradient_norm'", "hft.importance to weight_norm"
    for name in ("frozen_dtype", "frozen_quantization"):
        if elements and vars(hft_config)[name]:
            raise HFTError(
                f"{what}, with which no parameter of the layers is frozen as a whole, so hft.{name} would save nothing: leave "
                f"it out, or set {remedy}."
            )
    if elements and hft_config.optimizer_in_backward:
        raise HFTError(
            f"{what}, which puts the frozen elements back after each step of the optimizer, and with hft.optimizer_in_backward "
            f"there is one for each parameter: leave it out, or set {remedy}."
        )
    sharded = sharded_by(args)
    if sharded:
        raise HFTError(
            f"{what}, which needs whole parameters and gradients in each process, but {sharded} divides them: train in one process or with DDP, or set {remedy}."
        )
    if not elements and args is not None and args.mixed_precision == "fp16":
        raise HFTError(
            f"{what}, but in fp16 small gradients become 0 without the scaling that only a training step has: use bf16, or set "
            f"{remedy}."
        )


def check_frozen_quantization(args: TrainingArguments, hft_config: HFTConfig) -> None:
    """
    Refuse to quantise the frozen half where a backend shards it, or where the reference would be another model.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The trainer's arguments.
        hft_config ([`HFTConfig`]):
            What to train, and how it is stored.

    Raises:
        [`HFTError`]: Naming the setting to change.
    """
    has_reference = "sync_ref_model" in vars(args)
    sharded = sharded_by(args)
    for wrong, why in (
        (sharded, f"{sharded} can't shard quantised matrices: leave it out, or train in one process or with DDP"),
        (
            has_reference and not hft_config.share_reference,
            "hft.share_reference is false, so the reference would not be the quantised model that training starts from: set it "
            "to true",
        ),
        (
            vars(args).get("sync_ref_model"),
            "sync_ref_model moves the reference, which shares the quantised matrices: leave one of the two out",
        ),
        (
            vars(args).get("precompute_ref_log_probs"),
            "precompute_ref_log_probs computes with the reference before its frozen half is quantised: leave one of the two "
            "out",
        ),
    ):
        if wrong:
            raise HFTError(f"hft.frozen_quantization is {hft_config.frozen_quantization}, but {why}.")


def check_optimizer_in_backward(args: TrainingArguments) -> None:
    """
    Refuse what needs all gradients at once, or would update a parameter twice.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The trainer's arguments.

    Raises:
        [`HFTError`]: Naming the setting to change.
    """
    sharded = sharded_by(args)
    checkpointing = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    for wrong, why in (
        (
            (args.max_grad_norm or 0) > 0,
            f"max_grad_norm is {args.max_grad_norm or 0:g}, and clipping needs the norm of all gradients before the first update: set "
            "max_grad_norm to 0",
        ),
        (
            args.gradient_accumulation_steps > 1,
            f"gradient_accumulation_steps is {args.gradient_accumulation_steps}, and gradients that are freed can't be added "
            "up: set it to 1, with a larger per_device_train_batch_size",
        ),
        (sharded, f"{sharded} keeps gradients itself: leave it out, or train in one process"),
        (
            args.world_size > 1 or args.n_gpu > 1,
            f"there are {max(args.world_size, args.n_gpu)} processes or GPUs, whose gradients have to be averaged first: train "
            "in one process on one GPU",
        ),
        (args.fp16, "fp16 scales gradients, which are looked at before the update: use bf16, or none"),
        (
            args.optim not in APART,
            f"optim is {OptimizerNames(args.optim).value}, which was not tested with it: use one of {', '.join(APART)}",
        ),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size would repeat a step of which a part is applied: set per_device_train_batch_size",
        ),
        (
            checkpointing,
            "reentrant checkpointing would update what several layers share more than once: set use_reentrant to false",
        ),
    ):
        if wrong:
            raise HFTError(f"hft.optimizer_in_backward is true, but {why}.")


def refuse_adapters(given: dict[str, Any]) -> None:
    """
    Refuse an adapter and a quantised model, whose own weights don't learn.

    Args:
        given (`dict[str, Any]`):
            The arguments of the trainer, by name.

    Raises:
        [`HFTError`]: Naming the argument to drop.
    """
    model = given.get("model")
    if given.get("peft_config") is not None or (isinstance(model, torch.nn.Module) and is_peft_model(model)):
        raise HFTError(
            "HFT trains the model's own weights, but a peft_config or a PEFT model was passed: drop it, or train the "
            "adapter with TRL's own trainer."
        )
    if given.get("quantization_config") is not None:
        raise HFTError("HFT trains the model's own weights, but a quantization_config was passed: drop it.")


def refuse_own_optimizer(given: dict[str, Any]) -> None:
    """
    Refuse an optimizer of the user's where each parameter is updated by one of its own.

    Args:
        given (`dict[str, Any]`):
            The arguments of the trainer, by name.

    Raises:
        [`HFTError`]: Naming the argument to drop.
    """
    for name in ("optimizers", "optimizer_cls_and_kwargs"):
        value = given.get(name)
        if value is not None and next(iter(value)) is not None:
            raise HFTError(
                f"hft.optimizer_in_backward is true, but {name} was passed, of which it is not known whether each parameter is "
                "updated apart from the others: use optim."
            )


def refuse_frozen(optimizer: torch.optim.Optimizer, model: PreTrainedModel) -> None:
    """
    Refuse an optimizer that holds parameters of the frozen half.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The user's optimizer.
        model ([`~transformers.PreTrainedModel`]):
            The policy, to which the selection has been applied.

    Raises:
        [`HFTError`]: Naming one of the parameters.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    frozen = [name for name, p in named_parameters(model) if not p.requires_grad and id(p) in held]
    if frozen:
        raise HFTError(
            f"optimizers holds {len(frozen)} frozen parameters, such as {frozen[0]}: let the trainer build the optimizer "
            "(use optim, or optimizer_cls_and_kwargs), or build it from select(model, hft_config).trainable."
        )
