"""The frozen half in memory: what its bits were, whether they still are, and in which type it is held."""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from hft_trl.errors import HFTError
from hft_trl.files import resolved
from hft_trl.frozen.quantized_linear import QuantizedLinear, frozen_matrices
from hft_trl.weights import fingerprints, named_parameters, plain_name, tensors, weight_files

logger = logging.get_logger(__name__)


class FrozenHalf:
    """
    The parameters that must keep their bits, known by their fingerprints.

    Args:
        digests (`dict[str, str]`):
            Fingerprint (SHA-256, hex) of every frozen parameter by name. Empty where everything learns.
    """

    def __init__(self, digests: dict[str, str]) -> None:
        self.digests = digests
        self._cast: dict[str, tuple[Path, torch.dtype, str]] = {}
        self._first_name: dict[str, str] = {}

    def hold_in(
        self,
        dtype: torch.dtype,
        model: PreTrainedModel,
        revision: str | None = None,
        reference: torch.nn.Module | None = None,
    ) -> None:
        """
        Hold the frozen half in a smaller type, without a copy in the larger one.

        Where that rounds, or the start model's file has another type, the file's own tensors are saved later on. A
        parameter stays as it is where rounding would change it and no file holds it under its name (fused experts), where
        its values do not fit, in an `nn.LayerNorm`, which can't compute with two types on a CPU, and in a norm of queries or keys.

        Args:
            dtype (`torch.dtype`):
                The type.
            model ([`~transformers.PreTrainedModel`]):
                The model before its first step and before anything has wrapped it.
            revision (`str`, *optional*):
                Branch, tag or commit that the model was loaded from.
            reference (`torch.nn.Module`, *optional*):
                A reference with weights of its own, which is rounded likewise, so that it stays the start model.
        """
        kept = kept_in_their_type(model)
        parameters = {name: p for name, p in named_parameters(model) if name in self.digests}
        others = dict(named_parameters(reference)) if reference is not None else {}
        files = _start_files(model, revision)
        on_disk = _on_disk(files, parameters)
        left = []
        for name, parameter in parameters.items():
            loaded = parameter.data
            if id(parameter) not in kept:
                cast = loaded.to(dtype)
                if torch.equal(cast.to(loaded.dtype), loaded) or (name in on_disk and cast.isfinite().all()):
                    parameter.data = cast
                    if name in others:
                        others[name].data = others[name].data.to(dtype)
                else:
                    left.append(name)
            if on_disk.get(name, parameter.dtype) != parameter.dtype:
                self._cast[name] = (files[name], loaded.dtype, self.digests[name])
        if left:
            logger.warning(
                f"hft.frozen_dtype leaves {len(left)} frozen parameters in their own type, such as {left[0]}: they do not fit "
                f"into {str(dtype).removeprefix('torch.')}, and could not be saved with their own bits from "
                f"{model.config._name_or_path!r}, whose safetensors files do not hold them under these names."
            )
        self._note_names(model)
        self.digests = self.digests | fingerprints(parameters.items())

    def quantize(
        self,
        kind: str,
        model: PreTrainedModel,
        revision: str | None = None,
        reference: torch.nn.Module | None = None,
    ) -> None:
        """
        Hold the frozen matrices of attention and feed-forward in 8 or 4 bits. The start model's file is what is saved later on.

        What is no `nn.Linear` (fused experts, GPT-2's Conv1D), shares a parameter, or is in no file under its name stays whole,
        which is said.

        Args:
            kind (`str`):
                `"int8"` or `"nf4"`.
            model ([`~transformers.PreTrainedModel`]):
                The model before its first step and before anything has wrapped it.
            revision (`str`, *optional*):
                Branch, tag or commit that the model was loaded from.
            reference (`torch.nn.Module`, *optional*):
                A reference that shares the frozen half, which then shares the quantised modules.
        """
        self._note_names(model)
        matrices = frozen_matrices(model, self.digests.keys())
        files = _start_files(model, revision)
        on_disk = _on_disk(files, {name: model.get_parameter(name) for name in matrices})
        before, after, left = 0, 0, []
        for name in matrices:
            path, parameter, linear = name.rpartition(".")[0], model.get_parameter(name), matrices[name]
            matrices[name] = None  # so that each whole matrix is gone before the next one is quantised
            quantized = QuantizedLinear(linear, kind) if linear is not None and name in on_disk else None
            if quantized is None or not quantized.fits:
                left.append(name)
                continue
            before, after = before + parameter.nbytes, after + quantized.nbytes
            self._cast[name] = (files[name], parameter.dtype, self.digests[name])
            for holder in (model, reference):
                if holder is not None:
                    holder.set_submodule(path, quantized)
            held_as = [(f"{path}.packed", quantized.packed), (f"{path}.scale", quantized.scale)]
            self.digests = {key: digest for key, digest in self.digests.items() if key != name} | fingerprints(held_as)
        held = len(matrices) - len(left)
        PartialState().print(f"frozen half: {held} matrices in {kind}, {after:,} bytes instead of {before:,}.")
        if left:
            logger.warning(
                f"hft.frozen_quantization leaves {len(left)} frozen matrices whole, such as {left[0]}: they are no nn.Linear of "
                f"their own, too large for {kind}, or not in the safetensors files of {model.config._name_or_path!r} under these "
                "names and with these values."
            )

    def _note_names(self, model: torch.nn.Module) -> None:
        """Note the first of each tied parameter's names, under which the files may hold it."""
        by_id: dict[int, str] = {}
        for name, parameter in named_parameters(model, remove_duplicate=False):
            self._first_name[name] = by_id.setdefault(id(parameter), name)

    def as_saved(
        self, model: torch.nn.Module, state_dict: dict[str, torch.Tensor] | None, folder: str
    ) -> dict[str, torch.Tensor] | None:
        """
        What to save of a model: its state dict with the start model's own tensors where [`hold_in`] has rounded them.

        Args:
            model (`torch.nn.Module`):
                The model.
            state_dict (`dict[str, torch.Tensor]`, *optional*):
                Its whole state dict if the backend had to gather it.
            folder (`str`):
                Where it will be saved.

        Raises:
            [`HFTError`]: If the start model's files are gone or have changed.
        """
        if not self._cast:
            return state_dict
        files = {name: path for name, (path, _, _) in self._cast.items()}
        try:
            start = dict(tensors(files, files))
        except (OSError, SafetensorError) as error:
            raise HFTError(
                f"the frozen half is saved from the start model's files, and one is gone or torn ({error}): restore it."
            ) from error
        found = fingerprints((name, tensor.to(self._cast[name][1])) for name, tensor in start.items())
        for name, digest in found.items():
            if digest != self._cast[name][2]:
                raise HFTError(
                    f"the frozen half is saved from the start model's files, but {name} has changed in {str(files[name])!r}: "
                    "restore the file."
                )
        if any(resolved(path).parent == resolved(folder) for path in files.values()):
            start = {name: tensor.clone() for name, tensor in start.items()}  # their file is about to be overwritten
        saved, named = {}, set()
        for name, tensor in (model.state_dict() if state_dict is None else state_dict).items():
            plain = plain_name(name)
            first = self._first_name.get(plain, plain)
            saved[name] = start.get(first, tensor)
            named.add(first)
        return saved | {name: start[name] for name in start.keys() - named}  # quantised matrices are in no state dict

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
        found = fingerprints((name, tensor) for name, tensor in named_parameters(model) if name in self.digests)
        for name in self.digests.keys() - found.keys():
            raise RuntimeError(f"the frozen parameter {name} is not in the model any more, so it can't be checked")
        for name, digest in found.items():
            if digest != self.digests[name]:
                raise RuntimeError(
                    f"the frozen parameter {name} moved during training: nothing was saved as a success"
                )


def kept_in_their_type(model: torch.nn.Module) -> set[int]:
    """
    The `id` of each parameter that [`FrozenHalf.hold_in`] leaves as it is whatever its values are: those of `nn.LayerNorm`, and
    of norms inside of attention. If one of query and key were normed in the smaller type, flash attention would refuse the pair.
    """
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    attentions = [module for module in model.modules() if "attention" in type(module).__name__.lower()]
    norms += [child for module in attentions for child in module.children() if "norm" in type(child).__name__.lower()]
    return {id(parameter) for norm in norms for parameter in norm.parameters()}


def _start_files(model: PreTrainedModel, revision: str | None) -> dict[str, Path]:
    """The safetensors file of every tensor of the model that was loaded, by name; nothing if there are none."""
    try:
        return weight_files(model.config._name_or_path, revision)
    except (HFTError, OSError):
        return {}


def _on_disk(files: Mapping[str, Path], parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.dtype]:
    """Type on disk of each parameter that a file holds under its name, with its values."""
    found = {}
    for name, tensor in tensors(files, parameters.keys() & files.keys()):
        loaded = parameters[name].detach().cpu()
        if tensor.shape == loaded.shape and torch.equal(tensor.to(loaded.dtype), loaded):
            found[name] = tensor.dtype
    return found
