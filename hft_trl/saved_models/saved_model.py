"""A saved model as single tensors, under their parameters' names in transformers."""

import copy
from collections.abc import Iterator, Mapping
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
from hft_trl.weights import check_readable, combined_digest, fingerprint, weight_files

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
    have the tensors' names in the files as keys; buffers have no place. Models that are missing, quantised or
    incomplete, or whose tensors hold several parameters, raise an [`HFTError`].
    """

    def __init__(self, name: str, skeleton: PreTrainedModel | None = None) -> None:
        self.name = name
        self.path = _cached(name) if "@" in name and not Path(name).is_dir() else demo.model_path(name)
        self.skeleton = skeleton if skeleton is not None else build_on_meta(self.path)
        self.files = _tensor_files(self.path, name)
        self._file, self._opened = None, None
        transforms = get_model_conversion_mapping(self.skeleton)
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self.places = _places(self.skeleton, self.files, renamings, self._converters, name)
        _check_floating(self)
        # Tensors by parameter and piece. A tied parameter is read once, under its first name.
        self._pieces: dict[str, dict[str, str]] = {}
        for key in sorted(self.places, key=dot_natural_key):
            place = self.places[key]
            pieces = self._pieces.setdefault(place.parameter, {})
            if key == place.parameter or place.piece not in pieces:
                pieces[place.piece] = key

    def tensor(self, key: str) -> torch.Tensor:
        """Return a memory-mapped tensor by its name in the file."""
        # One file stays open, because reading its header again for each tensor is slow
        if self._file != self.files[key]:
            self._file, self._opened = self.files[key], safe_open(self.files[key], framework="pt")
        return self._opened.get_tensor(key)

    def counterpart(self, key: str, other: "SavedModel") -> torch.Tensor | None:
        """Return the other model's tensor at the place of this model's `key`, or `None`."""
        place = self.places[key]
        theirs = other._pieces.get(place.parameter, {}).get(place.piece)
        return other.tensor(theirs) if theirs is not None else None

    def pairs(self, other: "SavedModel", parameter: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Return both models' tensors of a parameter, where both have them in one shape."""
        for key in self._pieces.get(parameter, {}).values():
            theirs, ours = self.counterpart(key, other), self.tensor(key)
            if theirs is not None and theirs.shape == ours.shape:
                yield theirs, ours

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the type of each parameter on disk."""
        return {place.parameter: self.tensor(key).dtype for key, place in self.places.items()}

    def digest(self, dtypes: Mapping[str, torch.dtype]) -> str | None:
        """
        Return the start model's SHA-256 (hex) for a selection, `None` if a parameter has no file.

        `dtypes` are the types of the parameters in training.
        """
        digests = {}
        names = [name for name, _ in self.skeleton.named_parameters()]
        if any(name not in self._pieces or name not in dtypes for name in names):
            return None
        for name in logging.tqdm(names, desc=f"Digest of {self.name}", disable=None, leave=False):
            digests[name] = fingerprint(self.parameter(name), dtypes[name])
        return combined_digest(digests)

    def parameter(self, name: str) -> torch.Tensor:
        """Return a complete parameter by its name in the model, fused from its pieces."""
        keys = list(self._pieces[name].values())
        pattern = self.places[keys[0]].pattern
        if not pattern:
            return self.tensor(keys[0])
        converter = copy.deepcopy(next(each for each in self._converters if pattern in each.source_patterns))
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
    """Return the file of every tensor, checked against the index."""
    listed = weight_files(path)
    check_readable(listed.values())
    files: dict[str, Path] = {}
    for file in sorted(set(listed.values())):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                if key in files:
                    raise HFTError(f"{name!r} holds {key} twice, in {files[key].name} and {file.name}: save it again.")
                files[key] = file
    wrong = next((key for key, file in listed.items() if files.get(key) != file), None)
    if wrong is not None:
        raise HFTError(f"{name!r} has no {wrong} in {listed[wrong].name}, where its index says it is: save it again.")
    return files


def _check_floating(saved: SavedModel) -> None:
    """Reject weights that are quantised although the config does not say so."""
    for key in saved.places:
        dtype = saved.tensor(key).dtype
        if dtype not in FULL_PRECISION:
            raise HFTError(
                f"{key} is {short(dtype)} in {saved.name!r}, so the model is quantised: give the full-precision model."
            )


def _places(
    skeleton: PreTrainedModel,
    keys: Mapping[str, object],
    renamings: list[WeightRenaming],
    converters: list[WeightConverter],
    model: str,
) -> dict[str, Place]:
    """Return the place of each tensor after transformers' renamings and conversions."""
    state, prefix = skeleton.state_dict(), skeleton.base_model_prefix
    first_name = {id(parameter): name for name, parameter in skeleton.named_parameters()}
    parameters = {
        name: first_name[id(parameter)] for name, parameter in skeleton.named_parameters(remove_duplicate=False)
    }
    places = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in parameters:  # a buffer, or a tensor that the model ignores
            continue
        if pattern is None:
            places[key] = Place(parameters[name], "", "")
            continue
        converter = next(each for each in converters if pattern in each.source_patterns)
        if len(converter.target_patterns) > 1:
            raise HFTError(
                f"{key} in {model!r} holds several parameters, such as {name}, which cannot be separated in the file: "
                "load the model and save it with save_pretrained(folder, save_original_format=False) first."
            )
        piece, _ = rename_source_key(key, renamings, [])
        places[key] = Place(parameters[name], piece.removeprefix(f"{prefix}."), pattern)
    return places
