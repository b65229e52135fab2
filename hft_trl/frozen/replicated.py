"""The frozen half whole in every process under FSDP2: it never changes, so it needs no gathering."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from transformers import PreTrainedModel

from hft_trl.backends.fsdp import replicates_frozen
from hft_trl.errors import HFTError
from hft_trl.frozen.half import Storage
from hft_trl.frozen.smaller_type import kept_in_their_type
from hft_trl.weights import named_parameters


class Replicated(Storage):
    """Has FSDP2 leave the policy's frozen half whole in every process."""

    def __init__(self) -> None:
        self._whole: list[torch.nn.Parameter] = []
        self._left = ExitStack()

    def settle(self, trainer: Any, policy: PreTrainedModel, reference: torch.nn.Module | None) -> None:  # noqa: ARG002
        config = trainer.hft_config
        if not replicates_frozen(config, trainer.args):
            reason = "with method fft" if config.method == "fft" else "without FSDP2: every process holds all of it"
            PartialState().print(f"hft.replicate_frozen changes nothing {reason}.")
            return
        self._whole = parameters(policy, trainer.frozen_half.digests)
        check(trainer.accelerator, policy, self._whole)
        size, everything = (sum(p.nbytes for p in some) for some in (self._whole, policy.parameters()))
        PartialState().print(
            f"frozen half: {size:,} of the policy's {everything:,} bytes are whole in each process, FSDP2 shards the "
            "rest."
        )

    def before_training(self, trainer: Any) -> None:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        self._left.enter_context(left_whole(trainer.accelerator, policy, self._whole))

    def training_begins(self, trainer: Any) -> None:  # noqa: ARG002
        self._left.close()  # the model is sharded

    def training_ends(self, trainer: Any) -> None:  # noqa: ARG002
        self._left.close()  # where training failed before it began


def parameters(model: torch.nn.Module, frozen: Collection[str]) -> list[torch.nn.Parameter]:
    """Return the parameters that FSDP2 is to leave whole, given the names of all frozen ones."""
    kept = kept_in_their_type(model, sharded=True)  # FSDP2 casts only what it gathers
    return [parameter for name, parameter in named_parameters(model) if name in frozen and id(parameter) not in kept]


def check(accelerator: Accelerator, model: torch.nn.Module, whole: list[torch.nn.Parameter]) -> None:
    """Reject whole parameters that FSDP2 cannot use."""
    plugin, ids = accelerator.state.fsdp_plugin, {id(parameter) for parameter in whole}
    if plugin.ignored_modules is not None:
        raise HFTError(
            f"fsdp_ignored_modules is {plugin.ignored_modules!r}, which says itself what FSDP leaves whole: drop it, "
            "or set hft.replicate_frozen to false."
        )
    computes_in = plugin.mixed_precision_policy and plugin.mixed_precision_policy.param_dtype
    for name, parameter in named_parameters(model):
        if computes_in is not None and id(parameter) in ids and parameter.dtype != computes_in:
            ours, theirs = (str(dtype).removeprefix("torch.") for dtype in (parameter.dtype, computes_in))
            raise HFTError(
                f"hft.replicate_frozen is true, but {name} is {ours}, and FSDP2, which computes in {theirs}, casts "
                f"only what it shards: set hft.frozen_dtype to {theirs} (or load a {theirs} model with this dtype), "
                "or hft.replicate_frozen to false."
            )


@contextmanager
def left_whole(
    accelerator: Accelerator, model: torch.nn.Module, whole: list[torch.nn.Parameter], move: bool = True
) -> Iterator[None]:
    """Have FSDP2 leave parameters whole in this context. With `move` they go to the process's device."""
    if not whole:
        yield
        return
    # FSDP2 moves neither what it is told to ignore nor the buffers beside it
    for tensor in [*(whole if move else ()), *model.buffers()]:
        tensor.data = tensor.data.to(accelerator.device)
    plugin = accelerator.state.fsdp_plugin
    # accelerate takes modules, but a module may hold frozen and trained parameters (fused experts)
    before, plugin.ignored_modules = plugin.ignored_modules, [torch.nn.ParameterList(whole)]
    try:
        yield
    finally:  # later trainers of this process may have the same plugin
        plugin.ignored_modules = before
