"""What a trainer with a half checks and sets beside the half itself: before its model is loaded, and after."""

import inspect
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from hft_trl.backends.fsdp import check_backend, sharded_by
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.trainers.compatibility import check, check_optimizer
from hft_trl.trainers.idle import WarnOfIdleParameters


def check_given(init: Callable[..., None], args: Any, kwargs: Any, config: HFTConfig) -> dict[str, Any]:
    """
    Check what a trainer is built with before its model is loaded, and set up its backend.

    Returns:
        `dict[str, Any]`: The arguments by name, as far as the parent's signature tells them.

    Raises:
        [`HFTError`]: Naming the setting to change.
    """
    if not isinstance(config, HFTConfig):
        raise HFTError(f"hft_config is {config!r}: give an HFTConfig, such as HFTConfig(ratio=0.5).")
    signature = inspect.signature(init)
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            given.pop(name, None)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    if "ref_model" in signature.parameters:
        given.setdefault("ref_model", None)
    settings = given.get("args")
    check(settings, config, given)
    if sharded_by(settings) == "DeepSpeed":
        if settings is None:
            raise HFTError("args is None: under DeepSpeed pass the trainer's config, such as SFTConfig(output_dir).")
        from hft_trl.backends import zero

        zero.prepare(settings, config)
    return given


def check_built(trainer: Any, given: dict[str, Any]) -> None:
    """Check the arguments that a trainer has made itself, and the backend that only its accelerator shows."""
    if given.get("args") is None:
        check(trainer.args, trainer.hft_config, given)
    if trainer.hft_config.method == "hft":
        check_backend(trainer.accelerator.state)


def finish(trainer: Any, policy: PreTrainedModel) -> None:
    """Set what depends on the half: the optimizer, the inputs' gradients and the warning of idle parameters."""
    if trainer.hft_config.method != "hft":
        return
    if trainer.optimizer is not None:
        check_optimizer(trainer.optimizer, policy)
    # With a frozen embedding no input of the first layer needs a gradient, and reentrant checkpointing would then pass none
    # on to the layers.
    if (trainer.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        policy.enable_input_require_grads()
    if trainer.is_deepspeed_enabled:
        from hft_trl.backends import zero

        if vars(trainer).get("ref_model") is not None:
            zero.log_reference(trainer.accelerator.state.deepspeed_plugin)
    elif not trainer.hft_config.optimizer_in_backward:
        trainer.add_callback(WarnOfIdleParameters())
