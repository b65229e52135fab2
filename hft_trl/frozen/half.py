"""Define the fingerprints of the frozen half, and the interface of its storages."""

from typing import Any

import torch
from transformers import PreTrainedModel

from hft_trl.errors import HFTError
from hft_trl.weights import fingerprints, named_parameters, plain_name


class FrozenHalf:
    """Store the frozen parameters' fingerprints by name, and the types of the start model."""

    def __init__(self, model: PreTrainedModel, digests: dict[str, str]) -> None:
        self.digests, self.dtype = digests, model.dtype
        self.learning_types = {name: p.dtype for name, p in named_parameters(model) if p.requires_grad}
        self.forms: dict[str, tuple[torch.dtype, int]] = {}

    def check(self, model: torch.nn.Module) -> None:
        """Compare the frozen half of a model with its fingerprints. All processes must call it."""
        found = fingerprints((name, tensor) for name, tensor in named_parameters(model) if name in self.digests)
        for name, digest in self.digests.items():
            if found.get(name) != digest:
                types = {key: p.dtype for key, p in named_parameters(model)}
                if name in found and types[name] != self.forms.get(name, (types[name],))[0]:
                    raise HFTError(f"{name} was cast to {types[name]}: save the model first, and cast what is saved.")
                how = "moved" if name in found else "was removed"
                raise RuntimeError(f"the frozen parameter {name} {how} during training: the model is not saved")

    def note_forms(self, model: torch.nn.Module) -> None:
        """Note the types and sizes of the frozen parameters as they are to train."""
        self.forms = {name: (p.dtype, p.numel()) for name, p in named_parameters(model) if name in self.digests}

    def check_forms(self, model: torch.nn.Module) -> None:
        """Reject frozen parameters that were cast or resized after the trainer was built."""
        found = {name: (p.dtype, p.numel()) for name, p in named_parameters(model)}
        if changed := [name for name, form in self.forms.items() if found.get(name) != form]:
            raise HFTError(
                f"{len(changed)} frozen parameters, such as {changed[0]}, were cast, resized or removed after the "
                "trainer was built: change a model before, and then build the trainer."
            )

    def check_untouched(self, model: torch.nn.Module) -> None:
        """Reject parameters that were made trainable, or frozen, after the trainer was built."""
        learn = [name for name, p in named_parameters(model) if p.requires_grad and name in self.digests]
        if learn:
            raise HFTError(
                f"{len(learn)} frozen parameters, such as {learn[0]}, require gradients again: leave requires_grad as "
                "the trainer has set it, or set hft_config.ratio to train more."
            )
        rest = [name for name, p in named_parameters(model) if not p.requires_grad and name in self.learning_types]
        if rest:
            raise HFTError(
                f"{len(rest)} parameters that are to learn, such as {rest[0]}, were frozen after the trainer was "
                "built: freeze them before (they then do not count in the shares), or name them in hft_config.exclude."
            )

    def in_start_types(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Cast a gathered state dict back, in place: FSDP2 holds what learns in float32 in mixed precision."""
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.to(self.learning_types.get(plain_name(name), tensor.dtype))

    def write_dtype(self, model: PreTrainedModel, folder: str) -> None:
        """Correct the type in a saved config, where transformers names that of the first parameter in memory."""
        if str(model.config.dtype) not in (str(self.dtype), str(self.dtype).removeprefix("torch.")):
            model.config.dtype = self.dtype
            model.config.save_pretrained(folder)


class Storage:
    """
    One optional way to store or update the model, loaded only where its setting asks for it.

    Each method does nothing by default. A trainer calls them in this order: `settle` once, before anything has wrapped
    the policy; `before_training`, `training_begins` (policy and optimizer are wrapped) and `training_ends` in each
    `train`; `check` and `saved` whenever the model is saved.
    """

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
        """Return the state dict to save instead of the given one; `None` means the model's own."""
        return state_dict
