"""The frozen half whole in every process under FSDP2: it never changes, so it needs no gathering."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from transformers import TrainingArguments

from hft_trl.backends.fsdp import fsdp_version
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.frozen.half import kept_in_their_type
from hft_trl.weights import combined_digest, named_parameters

FFT = "hft.replicate_frozen changes nothing with method fft, which freezes nothing."
WHOLE_ANYWAY = "hft.replicate_frozen changes nothing without FSDP2: every process holds the whole model anyway."


def wanted(hft_config: HFTConfig, args: TrainingArguments | None) -> bool:
    """
    Whether FSDP2 is to leave the frozen half whole, known before there is an accelerator.

    Args:
        hft_config ([`HFTConfig`]):
            What to train.
        args ([`~transformers.TrainingArguments`], *optional*):
            The trainer's arguments.

    Raises:
        [`HFTError`]: Under DeepSpeed, which can't leave a part of a model whole.
    """
    if not hft_config.replicate_frozen or hft_config.method != "hft":
        return False
    if args is not None and args.deepspeed_plugin is not None:
        raise HFTError(
            "hft.replicate_frozen is true, but DeepSpeed stores the parameters itself: set it to false, or train under FSDP2, "
            "as in accelerate_configs/fsdp2.yaml."
        )
    return fsdp_version(args) == 2


def report(
    hft_config: HFTConfig, args: TrainingArguments, model: torch.nn.Module, whole: list[torch.nn.Parameter]
) -> None:
    """Say on the main process what [`HFTConfig`]'s `replicate_frozen` does here."""
    if wanted(hft_config, args):
        size, everything = (sum(p.nbytes for p in parameters) for parameters in (whole, model.parameters()))
        say = f"frozen half: {size:,} of the policy's {everything:,} bytes are whole in each process, FSDP2 shards the rest."
    else:
        say = FFT if hft_config.method == "fft" else WHOLE_ANYWAY
    PartialState().print(say)


def parameters(model: torch.nn.Module, frozen: Collection[str]) -> list[torch.nn.Parameter]:
    """
    What FSDP2 is to leave whole of a model.

    Args:
        model (`torch.nn.Module`):
            The policy or its reference, not sharded yet.
        frozen (`Collection[str]`):
            Names of its frozen parameters.

    Returns:
        `list[torch.nn.Parameter]`: The frozen parameters without those that `frozen_dtype` leaves in their own type: FSDP2 casts
            what it gathers to the type that it computes in, and nothing else.
    """
    kept = kept_in_their_type(model)
    return [parameter for name, parameter in named_parameters(model) if name in frozen and id(parameter) not in kept]


def check(
    accelerator: Accelerator, model: torch.nn.Module, whole: list[torch.nn.Parameter], digests: dict[str, str]
) -> None:
    """
    Refuse to leave parameters whole that could not be computed with, or that are not the same in every process.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator.
        model (`torch.nn.Module`):
            The policy before it is sharded.
        whole (`list[torch.nn.Parameter]`):
            Those of its parameters that FSDP2 is to leave whole.
        digests (`dict[str, str]`):
            Fingerprints of the frozen half by name. Every process has to call.

    Raises:
        [`HFTError`]: Naming the setting to change.
    """
    plugin, ids = accelerator.state.fsdp_plugin, {id(parameter) for parameter in whole}
    if plugin.ignored_modules is not None:
        raise HFTError(
            f"fsdp_ignored_modules is {plugin.ignored_modules!r}, which says itself what FSDP leaves whole: drop it, or set "
            "hft.replicate_frozen to false."
        )
    computes_in = plugin.mixed_precision_policy and plugin.mixed_precision_policy.param_dtype
    for name, parameter in named_parameters(model):
        if computes_in is not None and id(parameter) in ids and parameter.dtype != computes_in:
            ours, theirs = (str(dtype).removeprefix("torch.") for dtype in (parameter.dtype, computes_in))
            raise HFTError(
                f"hft.replicate_frozen is true, but {name} is {ours}, and FSDP2, which computes in {theirs}, casts only what it "
                f"shards: set hft.frozen_dtype to {theirs} (or load a {theirs} model with this dtype), or hft.replicate_frozen to false."
            )
    if len(set(gather_object([combined_digest(digests)]))) > 1:
        raise HFTError(
            "the processes loaded different frozen halves: give every process the same files of the start model."
        )


@contextmanager
def left_whole(
    accelerator: Accelerator, model: torch.nn.Module, whole: list[torch.nn.Parameter], move: bool = True
) -> Iterator[None]:
    """
    Have FSDP2 leave parameters of a model whole while it is sharded inside.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator.
        model (`torch.nn.Module`):
            The model that will be sharded.
        whole (`list[torch.nn.Parameter]`):
            The parameters to leave whole. With none, nothing is done.
        move (`bool`, *optional*, defaults to `True`):
            Whether to bring them to the process's own device, too.
    """
    if not whole:
        yield
        return
    # FSDP2 moves neither what it is told to ignore nor the buffers beside it.
    for tensor in [*(whole if move else ()), *model.buffers()]:
        tensor.data = tensor.data.to(accelerator.device)
    plugin = accelerator.state.fsdp_plugin
    # accelerate takes modules, but a module may hold frozen and trained parameters (fused experts)
    before, plugin.ignored_modules = plugin.ignored_modules, [torch.nn.ParameterList(whole)]
    try:
        yield
    finally:  # later trainers of this process may have the same plugin
        plugin.ignored_modules = before
