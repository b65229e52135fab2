"""Prepare a trainer with a half: check its arguments, draw the half, choose storages, check again."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from transformers import PreTrainedModel
from trl import BEMACallback, SyncRefModelCallback

from hft_trl import demo
from hft_trl.backends.fsdp import sharded_by
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.frozen.half import FrozenHalf, Storage
from hft_trl.frozen.quantized_linear import QuantizedLinear
from hft_trl.selection import Selection, select
from hft_trl.selection.importance import Squares
from hft_trl.selection.previous import selection_of
from hft_trl.selection.units import frozen_by_user
from hft_trl.trainers.compatibility import check
from hft_trl.weights import check_not_rounded, combined_digest, fingerprints, named_parameters


def check_given(init: Callable[..., None], args: Any, kwargs: Any, config: HFTConfig) -> dict[str, Any]:
    """
    Check what a trainer is built with before its model is loaded, and set up its backend.

    Returns the arguments by name, as far as the parent's signature has their names.
    """
    if not isinstance(config, HFTConfig):
        raise HFTError(f"hft_config is {config!r}: give an HFTConfig, such as HFTConfig(ratio=0.5).")
    signature = inspect.signature(init)
    given: dict[str, Any] = {"ref_model": None} if "ref_model" in signature.parameters else {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            given |= value
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            given[name] = value
    settings = given.get("args")
    check(settings, config, given)
    if settings is not None and not settings.accelerator_config.use_configured_state:
        # accelerate would keep the mixed precision and torch_compile of an earlier trainer of this process
        AcceleratorState._reset_state()
    if sharded_by(settings) == "DeepSpeed":
        if settings is None:
            raise HFTError("args is None: under DeepSpeed pass the trainer's config, such as SFTConfig(output_dir).")
        from hft_trl.backends import zero

        zero.prepare(settings, config)
    return given


def draw_half(trainer: Any, policy: PreTrainedModel) -> tuple[Selection, FrozenHalf]:
    """
    Draw a trainer's selection, apply it to the policy, and fingerprint the half that is frozen.

    The policy is not wrapped yet. Where DeepSpeed casts a whole model, it is cast here. Every process has to call.
    A model that was loaded in a type that rounds its weights is rejected.
    """
    quantized = any(isinstance(module, QuantizedLinear) for module in policy.modules())
    if quantized or vars(policy).get("_hft_rounded"):
        what = "quantized by hft.frozen_quantization" if quantized else "cast by hft.frozen_dtype"
        raise HFTError(
            f"the model's matrices were {what} in an earlier stage, and it cannot be trained further as it is: save "
            "that stage, and pass its folder."
        )
    config, hft = trainer.hft_config, trainer.hft_config.method == "hft"
    previous = selection_of(policy, trainer._revision)
    if previous is not None and previous.masks is not None:
        check(trainer.args, config, after_elements=True)

    def calibrate(names: list[str]) -> Squares:
        from hft_trl.trainers.calibration import measured_once

        return measured_once(trainer, policy, names, config)

    selection = select(policy, config, previous, calibrate)
    if kept := frozen_by_user(policy):
        trainer.accelerator.print(
            f"{len(kept)} parameters, such as {min(kept)}, were frozen before and stay so, outside of the shares."
        )
    if hft:
        remedy = None
        if trainer.is_deepspeed_enabled:
            from hft_trl.backends import zero

            remedy = zero.cast(policy, trainer.accelerator.state)
        types = {name: parameter.dtype for name, parameter in named_parameters(policy) if not parameter.is_meta}
        check_not_rounded(policy.config._name_or_path, types, trainer._revision, remedy)
    start = fingerprints(named_parameters(policy))
    name = demo.address(policy.config._name_or_path, trainer._revision)
    source = {"name_or_path": name, "weights_digest": combined_digest(start)}
    selection.apply(policy)
    learns = set(selection.trainable) if hft else start.keys()
    half = FrozenHalf(policy, {name: digest for name, digest in start.items() if name not in learns})
    if len(set(gather_object([(selection.digest, combined_digest(half.digests))]))) > 1:
        raise HFTError(
            "the processes have different frozen halves: give all of them the same files of the start model."
        )
    return dataclasses.replace(selection, start_model=source), half


def storages(config: HFTConfig, masked: bool) -> list[Storage]:
    """Return the storages of the settings. `masked` means that single elements are frozen."""
    found: list[Storage] = []
    if config.method == "hft" and config.frozen_dtype:
        from hft_trl.frozen.smaller_type import SmallerType

        found.append(SmallerType(config.frozen_dtype))
    if config.replicate_frozen:
        from hft_trl.frozen.replicated import Replicated

        found.append(Replicated())
    if config.method == "hft" and config.frozen_quantization:
        from hft_trl.frozen.quantized_linear import Quantized

        found.append(Quantized(config.frozen_quantization))
    if masked:
        from hft_trl.frozen.elements import FrozenElements

        found.append(FrozenElements())
    if config.optimizer_in_backward:
        from hft_trl.trainers.optimizer_in_backward import OptimizerInBackward

        found.append(OptimizerInBackward())
    return found


def check_optimizer(trainer: Any, policy: PreTrainedModel) -> None:
    """Reject a user's optimizer that does not hold exactly the parameters that are to learn."""
    if trainer.hft_config.method != "hft" or trainer.optimizer is None:
        return
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    wrong = [(name, p.requires_grad) for name, p in named_parameters(policy) if p.requires_grad != (id(p) in held)]
    for learns, what in ((False, "holds {} frozen parameters"), (True, "lacks {} parameters that are to learn")):
        names = [name for name, found in wrong if found is learns]
        if names:
            raise HFTError(
                f"optimizers {what.format(len(names))}, such as {names[0]}: let the trainer build the optimizer (use "
                "optim), or build it after the trainer from the parameters that require gradients, and set "
                "trainer.optimizer."
            )


def check_before_training(trainer: Any) -> None:
    """Reject callbacks and parameter changes that a half does not allow, before training."""
    hft, callbacks = trainer.hft_config.method == "hft", trainer.callback_handler.callbacks
    if hft and any(isinstance(callback, BEMACallback) for callback in callbacks):
        raise HFTError(
            "BEMACallback takes the parameters that learn for all parameters, and fails at its first update: "
            "remove the callback, or set hft_config.method to fft."
        )
    if trainer._shares_reference and any(isinstance(callback, SyncRefModelCallback) for callback in callbacks):
        raise HFTError(
            "SyncRefModelCallback would write into the frozen half, which the reference shares with the policy: "
            "set sync_ref_model to true instead, or hft_config.share_reference to false."
        )
    if not trainer.is_deepspeed_enabled:  # ZeRO-3 takes parameters apart
        trainer.frozen_half.check_forms(trainer.accelerator.unwrap_model(trainer.model))
