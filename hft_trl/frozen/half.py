"""The half that must keep its bits: its fingerprints, and the interface of what stores it in another way."""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.selection import Selection, select
from hft_trl.selection.marks import frozen_by_user, selection_of
from hft_trl.weights import check_not_rounded, combined_digest, fingerprints, named_parameters, plain_name


def draw_half(trainer: Any, policy: PreTrainedModel) -> tuple[Selection, "FrozenHalf"]:
    """
    Draw a trainer's selection, apply it to the policy, and fingerprint the half that is frozen.

    The policy is not wrapped yet. Where DeepSpeed casts a whole model, it is cast here. Every process has to call.

    Raises:
        [`HFTError`]: If the processes disagree, or the model was loaded in a type that rounds its weights.
    """
    config, previous, hft = trainer.hft_config, selection_of(policy), trainer.hft_config.method == "hft"
    if previous is not None and previous.masks is not None:
        from hft_trl.trainers.compatibility import check

        check(trainer.args, config, after_elements=True)
    selection = select(policy, config, previous, partial(_gradients, trainer, policy))
    if hft and (kept := frozen_by_user(policy)):
        trainer.accelerator.print(
            f"{len(kept)} parameters, such as {min(kept)}, were frozen before and stay so, outside of the shares."
        )
    digests = set(gather_object([selection.digest]))
    if len(digests) > 1:
        raise HFTError(f"the processes drew different selections ({', '.join(sorted(digests))}): report a bug.")
    if hft:
        remedy = None
        if trainer.is_deepspeed_enabled:
            from hft_trl.backends import zero

            remedy = zero.cast(policy, trainer.accelerator.state)
        types = {name: parameter.dtype for name, parameter in named_parameters(policy) if not parameter.is_meta}
        check_not_rounded(policy.config._name_or_path, types, remedy)
    start = fingerprints(named_parameters(policy))
    source = {"name_or_path": policy.config._name_or_path, "weights_digest": combined_digest(start)}
    selection.apply(policy)
    learns = set(selection.trainable) if hft else start.keys()
    half = FrozenHalf(policy, {name: digest for name, digest in start.items() if name not in learns}, hft)
    return dataclasses.replace(selection, start_model=source), half


def _gradients(trainer: Any, policy: PreTrainedModel, names: list[str]) -> dict[str, float]:
    from hft_trl.trainers.gradient_norms import measured_once

    config = trainer.hft_config
    return measured_once(trainer, policy, names, samples=config.calibration_samples, seed=config.seed)


class FrozenHalf:
    """
    The parameters that must keep their bits, and the types of those that learn.

    Args:
        model (`torch.nn.Module`):
            The model, to which the selection has been applied. Nothing has wrapped it yet.
        digests (`dict[str, str]`):
            Fingerprint (SHA-256, hex) of every frozen parameter by name. Empty where everything learns.
        hft (`bool`, *optional*, defaults to `True`):
            Whether the method is `"hft"`. With `"fft"` the model is saved as the parent saves it.
    """

    def __init__(self, model: torch.nn.Module, digests: dict[str, str], hft: bool = True) -> None:
        self.digests = digests
        learning = ((name, p.dtype) for name, p in named_parameters(model) if p.requires_grad)
        self.learning_types = dict(learning) if hft else {}

    def check(self, model: torch.nn.Module) -> None:
        """
        Compare the frozen half of a model with its fingerprints. Under a sharded backend every process has to call.

        Raises:
            [`RuntimeError`]: Naming the first frozen parameter that moved or is missing.
        """
        if not self.digests:
            return
        found = fingerprints((name, tensor) for name, tensor in named_parameters(model) if name in self.digests)
        for name in self.digests.keys() - found.keys():
            raise RuntimeError(f"the frozen parameter {name} is not in the model any more, so it cannot be checked")
        for name, digest in found.items():
            if digest != self.digests[name]:
                raise RuntimeError(
                    f"the frozen parameter {name} moved during training: nothing was saved as a success"
                )

    @staticmethod
    def only_shards_saved(trainer: Any) -> bool:
        """Return whether FSDP saves shards, which are enough to resume from, but which no `from_pretrained` loads."""
        return trainer.is_fsdp_enabled and "FULL" not in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)

    def in_start_types(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Cast a gathered state dict back, in place: accelerate's FSDP2 holds what learns in float32 in mixed precision."""
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.to(self.learning_types.get(plain_name(name), tensor.dtype))

    def write_dtype(self, model: PreTrainedModel, folder: str) -> None:
        """
        Correct the type in a saved config, where it could round parameters at the next loading.

        transformers names the type of the first parameter in memory.
        """
        dtype = reduce(torch.promote_types, self.learning_types.values())
        if str(model.config.dtype) not in (str(dtype), str(dtype).removeprefix("torch.")):
            model.config.dtype = dtype
            model.config.save_pretrained(folder)


class Storage:
    """
    One optional way to store or update the model, loaded only where its setting asks for it.

    Each method does nothing by default. A trainer calls them in this order: `settle` once, before anything has wrapped the
    policy; `before_training`, `training_begins` (policy and optimizer are wrapped) and `training_ends` in each `train`;
    `check` and `saved` whenever the model is saved; `evaluating` around each evaluation step.
    """

    frees_gradients = False
    """Whether no gradient is left after the backward pass."""

    def settle(self, trainer: Any, policy: PreTrainedModel, reference: torch.nn.Module | None) -> None:
        """Store the policy, and the `reference` where it follows the policy, in this way."""

    def before_training(self, trainer: Any) -> None: ...

    def training_begins(self, trainer: Any) -> None: ...

    def training_ends(self, trainer: Any) -> None: ...

    def check(self) -> None:
        """Raise a [`RuntimeError`] if something moved that this storage keeps."""

    def saved(
        self,
        model: torch.nn.Module,  # noqa: ARG002
        state_dict: dict[str, torch.Tensor] | None,
        folder: str,  # noqa: ARG002
    ) -> dict[str, torch.Tensor] | None:
        """Return the state dict to save into a folder in place of the given one; `None` stands for the model's own."""
        return state_dict

    def evaluating(self, trainer: Any) -> AbstractContextManager:  # noqa: ARG002
        """Return the context that an evaluation step needs."""
        return nullcontext()


def storages(config: HFTConfig, masked: bool) -> list[Storage]:
    """
    Return the storages that the settings ask for. `masked` says whether the selection freezes single elements.

    Their modules are imported here, so that a run without them loads none.
    """
    found: list[Storage] = []
    hft = config.method == "hft"
    if hft and config.frozen_dtype:
        from hft_trl.frozen.smaller_type import SmallerType

        found.append(SmallerType(config.frozen_dtype))
    if config.replicate_frozen:
        from hft_trl.frozen.replicated import Replicated

        found.append(Replicated())
    if hft and config.frozen_quantization:
        from hft_trl.frozen.quantized_linear import Quantized

        found.append(Quantized(config.frozen_quantization))
    if masked:
        from hft_trl.frozen.elements import FrozenElements

        found.append(FrozenElements())
    if config.optimizer_in_backward:
        from hft_trl.trainers.optimizer_in_backward import OptimizerInBackward

        found.append(OptimizerInBackward())
    return found
