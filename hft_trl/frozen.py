"""The frozen half in memory: what its bits were, and whether they still are."""

import re

import torch

from hft_trl.weights import fingerprints

# What torch.compile and FSDP's activation checkpointing put into parameter names.
WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module)\.")


class FrozenHalf:
    """
    The parameters that must keep their bits, known by their fingerprints.

    Args:
        digests (`dict[str, str]`):
            Fingerprint (SHA-256, hex) of every frozen parameter by name. Empty where everything learns.
    """

    def __init__(self, digests: dict[str, str]) -> None:
        self.digests = digests

    def check(self, model: torch.nn.Module) -> None:
        """
        Compare the frozen half of a model with its fingerprints. Under a sharded backend every process has to call.

        Args:
            model (`torch.nn.Module`):
                The model without the backend's outermost wrapper.

        Raises:
            [`RuntimeError`]: Naming the first frozen parameter that moved or is gone.
        """
        if not self.digests:
            return
        named = ((WRAPPERS.sub("", name), tensor) for name, tensor in model.named_parameters())
        found = fingerprints((name, tensor) for name, tensor in named if name in self.digests)
        for name in self.digests.keys() - found.keys():
            raise RuntimeError(f"the frozen parameter {name} is not in the model any more, so it can't be checked")
        for name, digest in found.items():
            if digest != self.digests[name]:
                raise RuntimeError(
                    f"the frozen parameter {name} moved during training: nothing was saved as a success"
                )
