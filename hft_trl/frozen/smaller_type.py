"""Store the frozen half in a smaller type, and save tensors from the start model's files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from hft_trl.errors import HFTError
from hft_trl.files import resolved
from hft_trl.frozen.half import Storage
from hft_trl.weights import fingerprints, named_modules, named_parameters, plain_name, tensors, weight_files

logger = logging.get_logger(__name__)


class SavedFromStart(Storage):
    """Saves tensors of the start model's file for parameters that memory holds in another type."""

    def __init__(self) -> None:
        # By name the file that a parameter is saved from, and the type and fingerprint that its tensor had
        self._held: dict[str, tuple[Path, torch.dtype, str]] = {}
        # By each name of a tied parameter the first one, under which the file may hold it
        self._first_name: dict[str, str] = {}

    def saved(
        self, model: torch.nn.Module, state_dict: dict[str, torch.Tensor] | None, folder: str
    ) -> dict[str, torch.Tensor] | None:
        """Return the state dict with the start model's own tensors, whose files must be as they were."""
        if not self._held:
            return state_dict
        files = {name: path for name, (path, _, _) in self._held.items()}
        try:
            start = dict(tensors(files, files))
        except (OSError, SafetensorError) as error:
            raise HFTError(
                f"the frozen half is saved from the start model's files, and one is missing or damaged ({error}): "
                "restore it."
            ) from error
        found = fingerprints((name, tensor.to(self._held[name][1])) for name, tensor in start.items())
        for name, digest in found.items():
            if digest != self._held[name][2]:
                raise HFTError(
                    f"the frozen half is saved from the start model's files, but {name} has changed in "
                    f"{str(files[name])!r}: restore the file."
                )
        if any(resolved(path).parent == resolved(folder) for path in files.values()):
            start = {name: tensor.clone() for name, tensor in start.items()}  # their file is about to be overwritten
        state_dict = model.state_dict() if state_dict is None else state_dict
        first = {name: self._first_name.get(plain_name(name), plain_name(name)) for name in state_dict}
        missing = start.keys() - first.values()  # quantized matrices are in no state dict
        return {name: start.get(first[name], tensor) for name, tensor in state_dict.items()} | {
            name: start[name] for name in missing
        }


class SmallerType(SavedFromStart):
    """
    Hold the frozen half in a smaller type, `"bfloat16"` or `"float16"`.

    A parameter keeps its type where rounding would change it and no file holds it under its name (fused experts),
    where its values do not fit, and where autocast would not round it: in norms, for example.
    """

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self._dtype = getattr(torch, dtype)

    def settle(self, trainer: Any, policy: PreTrainedModel, reference: torch.nn.Module | None) -> None:
        """Round the frozen half of the policy, and of a reference that has its own weights."""
        half, left, rounded = trainer.frozen_half, [], {}
        if trainer.is_fsdp_enabled:
            reference = None  # it is sharded already, and computes in the type that FSDP2 casts to
        kept = kept_in_their_type(policy, trainer.is_fsdp_enabled)
        parameters = {name: p for name, p in named_parameters(policy) if name in half.digests}
        others = dict(named_parameters(reference)) if reference is not None else {}
        files = start_files(policy, trainer._revision)
        on_disk = types_on_disk(files, parameters)
        for name, parameter in parameters.items():
            loaded = parameter.data
            if id(parameter) not in kept:
                cast = loaded.to(self._dtype)
                if torch.equal(cast.to(loaded.dtype), loaded) or (name in on_disk and cast.isfinite().all()):
                    parameter.data = cast
                    if cast.dtype != loaded.dtype:
                        rounded[name] = parameter
                    if name in others:
                        others[name].data = others[name].data.to(self._dtype)
                else:
                    left.append(name)
            if on_disk.get(name, parameter.dtype) != parameter.dtype:
                self._held[name] = files[name], loaded.dtype, half.digests[name]
        if left:
            logger.warning(
                f"hft.frozen_dtype leaves {len(left)} frozen parameters in their own type, such as {left[0]}: their "
                f"values do not fit into {str(self._dtype).removeprefix('torch.')}, and the safetensors files of "
                f"{policy.config._name_or_path!r} do not hold them under these names."
            )
        by_id: dict[int, str] = {}
        for name, parameter in named_parameters(policy, remove_duplicate=False):
            self._first_name[name] = by_id.setdefault(id(parameter), name)
        half.digests = half.digests | fingerprints(rounded.items())
        policy._hft_rounded = bool(rounded)


def kept_in_their_type(model: PreTrainedModel, sharded: bool = False) -> set[int]:
    """
    Return the `id` of each parameter that autocast does not round: norms, vectors, float32 modules.

    FSDP2 (`sharded`) rounds these too when it gathers them. Then only parameters of `nn.LayerNorm` are returned, since
    a CPU computes it in one type.
    """
    layer_norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    kept = {id(parameter) for norm in layer_norms for parameter in norm.parameters()}
    if sharded:
        return kept
    always = model._keep_in_fp32_modules_strict or ()  # None in models with code of their own
    modules = named_modules(model)
    for name, parameter in named_parameters(model):
        owner, _, leaf = name.rpartition(".")
        vector = parameter.ndim < 2 and leaf != "bias"
        if vector or "norm" in type(modules[owner]).__name__.lower() or any(part in name for part in always):
            kept.add(id(parameter))
    return kept


def start_files(model: PreTrainedModel, revision: str | None) -> dict[str, Path]:
    """Return the absolute path of each tensor's safetensors file by its name; empty without files."""
    try:
        files = weight_files(model.config._name_or_path, revision)
        return {name: path.absolute() for name, path in files.items()}
    except (HFTError, OSError):
        return {}


def types_on_disk(files: Mapping[str, Path], parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.dtype]:
    """Return the type on disk of each parameter that a file holds under its name, with its values."""
    found = {}
    for name, tensor in tensors(files, parameters.keys() & files.keys()):
        loaded = parameters[name].detach().cpu()
        if tensor.shape == loaded.shape and torch.equal(tensor.to(loaded.dtype), loaded):
            found[name] = tensor.dtype
    return found
