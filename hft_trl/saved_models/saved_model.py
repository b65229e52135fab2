"""A saved model as single tensors, under their parameters' names in transformers."""

import copy
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import logging

from hft_trl import demo
from hft_trl.errors import HFTError, first_line
from hft_trl.skeleton import build_on_meta
from hft_trl.weights import combined_digest, fingerprint, weight_files

FULL_PRECISION = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Configs and tokenizer, which affect a model's answers as the weights do
FILES = ("config.json", "generation_config.json", "*token*", "vocab*", "merges.txt", "*.model", "chat_template*")


class Place(NamedTuple):
    """The position of a file's tensor in the model."""

    parameter: str  # the first name of a tied parameter
    piece: str  # piece of a parameter that transformers fuses from several tensors (experts), else ""
    pattern: str  # pattern of transformers' conversion that the piece matches, else ""


class SavedModel:
    """
    A saved causal LM, whose tensors are memory-mapped and read on demand.

    `name` is a folder, a hub id in the local cache (`"id@revision"`), `"demo"` or `"smollm2"`. `files` and `places`
    have the tensors' names in the files as keys; buffers have no place. `parameters` are those of the structure.
    Models that are missing or quantized, or whose tensors hold several parameters, raise an [`HFTError`].
    """

    def __init__(self, name: str, skeleton: PreTrainedModel | None = None) -> None:
        self.name = name
        # For a name that is too long, os.path.isdir returns False, but Path.is_dir raises
        is_revision = "@" in name and not os.path.isdir(name)  # noqa: PTH112
        self.path = _cached(name) if is_revision else demo.model_path(name)
        self.skeleton = skeleton if skeleton is not None else build_on_meta(self.path)
        self.parameters = dict(self.skeleton.named_parameters())
        self.files = _tensor_files(self.path, name)
        self._file, self._opened = None, None
        transforms = get_model_conversion_mapping(self.skeleton)
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self.places = self._find_places([each for each in transforms if isinstance(each, WeightRenaming)])
        self._keys: dict[Place, str] = {}
        # A tied parameter is read once, under its first name
        for key, place in sorted(self.places.items(), key=lambda item: dot_natural_key(item[0])):
            if place not in self._keys or key == place.parameter:
                self._keys[place] = key
        self._pieces: dict[str, list[str]] = {}
        for place, key in self._keys.items():
            self._pieces.setdefault(place.parameter, []).append(key)

    def _find_places(self, renamings: list[WeightRenaming]) -> dict[str, Place]:
        """Return the place of each tensor after transformers' renamings and conversions."""
        state, prefix = self.skeleton.state_dict(), self.skeleton.base_model_prefix
        first_name = {id(parameter): name for name, parameter in self.parameters.items()}
        every_name = {name: first_name[id(p)] for name, p in self.skeleton.named_parameters(remove_duplicate=False)}
        places = {}
        for key in self.files:
            name, pattern = rename_source_key(key, renamings, self._converters, prefix, state)
            if name not in state and key in state:
                name, pattern = key, None
            if name not in every_name:  # a buffer, or a tensor that the model ignores
                continue
            if (dtype := self.tensor(key).dtype) not in FULL_PRECISION:
                kind = short(dtype)
                raise HFTError(f"{key} is {kind}, so {self.name!r} is quantized: give the full-precision model.")
            piece = ""
            if pattern is not None:
                if len(self._converter(pattern).target_patterns) > 1:
                    raise HFTError(
                        f"{key} in {self.name!r} holds several parameters, such as {name}, which cannot be separated "
                        "in the file: load the model and save it with "
                        "save_pretrained(folder, save_original_format=False) first."
                    )
                piece = rename_source_key(key, renamings, [])[0].removeprefix(f"{prefix}.")
            places[key] = Place(every_name[name], piece, pattern or "")
        return places

    def _converter(self, pattern: str) -> WeightConverter:
        return next(each for each in self._converters if pattern in each.source_patterns)

    def tensor(self, key: str) -> torch.Tensor:
        """Return a memory-mapped tensor by its name in the file."""
        # One file stays open, because reading its header again for each tensor is slow
        if self._file != self.files[key]:
            self._file, self._opened = self.files[key], safe_open(self.files[key], framework="pt")
        return self._opened.get_tensor(key)

    def counterpart(self, key: str, other: "SavedModel") -> torch.Tensor | None:
        """Return the other model's tensor at the place of this model's `key`, or `None`."""
        theirs = other._keys.get(self.places[key])
        return other.tensor(theirs) if theirs is not None else None

    def is_repeated(self, key: str) -> bool:
        """Return whether another tensor of the files holds the same tied parameter."""
        return self._keys.get(self.places[key]) != key

    def pairs(self, other: "SavedModel", parameter: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Return both models' tensors of a parameter, where both have them in one shape."""
        for key in self._pieces.get(parameter, ()):
            theirs, ours = self.counterpart(key, other), self.tensor(key)
            if theirs is not None and theirs.shape == ours.shape:
                yield theirs, ours

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Types in the files, by parameter."""
        return {place.parameter: self.tensor(key).dtype for key, place in self.places.items()}

    def digest(self, dtypes: Mapping[str, torch.dtype]) -> str:
        """Return a start model's SHA-256 (hex) as in selections. `dtypes` are the types in training."""
        names = logging.tqdm(self.parameters, desc=f"Digest of {self.name}", disable=None, leave=False)
        return combined_digest({name: fingerprint(self.parameter(name), dtypes[name]) for name in names})

    def parameter(self, name: str) -> torch.Tensor:
        """Return a complete parameter by its name in the model, fused from its pieces."""
        keys = self._pieces[name]
        pattern = self.places[keys[0]].pattern
        if not pattern:
            return self.tensor(keys[0])
        converter = copy.deepcopy(self._converter(pattern))
        for key in keys:
            converter.add_tensor(name, key, self.places[key].pattern, self.tensor(key))
        found = converter.convert(name, model=self.skeleton, config=self.skeleton.config)[name]
        return found[0] if isinstance(found, list) else found


def short(dtype: torch.dtype) -> str:
    """Return the name of a type as users write it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _cached(name: str) -> str:
    """Return the folder of `id@revision` in the local cache."""
    repository, _, revision = name.partition("@")
    try:
        return snapshot_download(repository, revision=revision, local_files_only=True)
    except (OSError, ValueError) as error:
        raise HFTError(
            f"{name!r} is neither a folder nor in the local cache ({first_line(error)}): run hf download {repository} "
            f"--revision {revision} first."
        ) from error


def _tensor_files(path: str, name: str) -> dict[str, Path]:
    """Return the file of every tensor, sorted by file. Index and files must agree."""
    files, found = weight_files(path), set()
    for file in set(files.values()):
        with safe_open(file, framework="pt") as opened:
            found |= {(key, file) for key in opened.keys()}  # noqa: SIM118 (no mapping)
    if found != set(files.items()):
        key, file = min(found ^ set(files.items()))
        raise HFTError(f"{file.name} in {name!r} and its index differ in {key}: save or download the model again.")
    return dict(sorted(files.items(), key=lambda item: item[1]))
