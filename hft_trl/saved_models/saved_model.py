"""A saved model, tensor by tensor, under the names that its parameters have once transformers has loaded it."""

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


class Place(NamedTuple):
    """
    Where a tensor of a file belongs in the model.

    Args:
        parameter (`str`):
            Name of the parameter, the first of its names where it is tied.
        piece (`str`):
            Which piece of the parameter it is where transformers puts the parameter together from several tensors of the
            file (experts), else empty.
        pattern (`str`):
            The pattern by which transformers found it to be such a piece, else empty.
    """

    parameter: str
    piece: str
    pattern: str


class SavedModel:
    """
    A saved causal LM. Of its weights, only the tensors that are asked for are read, and those are mapped, not loaded.

    Args:
        name (`str`):
            Folder, hub id in the local cache (`"id@revision"` for a branch, tag or commit), or `"demo"`.
        skeleton ([`~transformers.PreTrainedModel`], *optional*):
            The model without weights, where it is known already. Built from the model's config by default.

    Attributes:
        skeleton ([`~transformers.PreTrainedModel`]): The model without weights.
        files (`dict[str, Path]`): The safetensors file of every tensor, by the tensor's name in the file.
        places (`dict[str, Place]`): Where each of these tensors belongs, of those that belong to a parameter.

    Raises:
        [`HFTError`]: If there is no such model, if it is quantised, if its files are not whole, or if a
            tensor holds several parameters.
    """

    def __init__(self, name: str, skeleton: PreTrainedModel | None = None) -> None:
        self.name = name
        self.path = _cached(name) if "@" in name and not Path(name).is_dir() else demo.model_path(name)
        self.skeleton = skeleton if skeleton is not None else build_on_meta(self.path)
        self.files = _tensor_files(self.path, name)
        self._file, self._opened = None, None
        transforms = get_model_conversion_mapping(self.skeleton)
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self.places = _places(self.skeleton, self.files, renamings, self._converters, name)
        _check_floating(self)
        self._key_at = {(place.parameter, place.piece): key for key, place in self.places.items()}
        self._keys: dict[str, list[str]] = {}  # by the parameter that they belong to
        for key in sorted(self.places, key=dot_natural_key):
            self._keys.setdefault(self.places[key].parameter, []).append(key)

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor by its name in the file. It lies in the file's own pages until it is written to."""
        # One file stays open: with thousands of tensors in each, its header is not read anew for every one.
        if self._file != self.files[key]:
            self._file, self._opened = self.files[key], safe_open(self.files[key], framework="pt")
        return self._opened.get_tensor(key)

    def counterpart(self, key: str, place: Place) -> str | None:
        """The tensor's name here that belongs where another model's tensor `key` belongs, `None` if there is none."""
        # A tied head may be in the file beside the embedding that it shares a parameter with.
        return key if self.places.get(key) == place else self._key_at.get((place.parameter, place.piece))

    def beside(self, other: "SavedModel", parameter: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The other model's and this one's tensors of a parameter, where both have them in one shape."""
        pieces = set()
        # A file may hold a tied parameter under each of its names: it is taken once, under its first.
        for key in sorted(self._keys.get(parameter, ()), key=lambda key: key != parameter):
            place = self.places[key]
            counterpart = other.counterpart(key, place)
            if counterpart is not None and place.piece not in pieces:
                pieces.add(place.piece)
                theirs, ours = other.tensor(counterpart), self.tensor(key)
                if theirs.shape == ours.shape:
                    yield theirs, ours

    def dtypes(self) -> dict[str, torch.dtype]:
        """Type of each parameter on disk."""
        return {place.parameter: self.tensor(key).dtype for key, place in self.places.items()}

    def digest(self, dtypes: Mapping[str, torch.dtype]) -> str | None:
        """
        The digest that training writes into a selection as that of its start model.

        A parameter that transformers puts together from pieces is put together here, too, one at a time.

        Args:
            dtypes (`Mapping[str, torch.dtype]`):
                Types of the parameters in training, by name.

        Returns:
            `str` or `None`: SHA-256 in hex, `None` where a parameter is not in the files.
        """
        digests = {}
        names = [name for name, _ in self.skeleton.named_parameters()]
        if any(name not in self._keys or name not in dtypes for name in names):
            return None
        for name in logging.tqdm(names, desc=f"Digest of {self.name}", disable=None, leave=False):
            digests[name] = fingerprint(self.parameter(name), dtypes[name])
        return combined_digest(digests)

    def parameter(self, name: str) -> torch.Tensor:
        """A whole parameter by its name in the model, put together where the file has it in pieces."""
        keys = self._keys[name]
        pattern = self.places[keys[0]].pattern
        if not pattern:
            return self.tensor(name if name in keys else keys[0])
        converter = copy.deepcopy(next(each for each in self._converters if pattern in each.source_patterns))
        for key in keys:
            converter.add_tensor(name, key, self.places[key].pattern, self.tensor(key))
        found = converter.convert(name, model=self.skeleton, config=self.skeleton.config)[name]
        return found[0] if isinstance(found, list) else found


def _cached(name: str) -> str:
    """The folder that the local cache has for `id@revision`."""
    repository, _, revision = name.partition("@")
    try:
        return snapshot_download(repository, revision=revision, local_files_only=True)
    except (OSError, ValueError) as error:
        raise HFTError(
            f"{name!r} is neither a folder nor in the local cache ({first_line(error)}): run hf download {repository} "
            f"--revision {revision} first."
        ) from error


def _tensor_files(path: str, name: str) -> dict[str, Path]:
    """What the files hold, and not what their index says that they hold."""
    listed = weight_files(path)
    check_readable(listed.values())
    files: dict[str, Path] = {}
    for file in sorted(set(listed.values())):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                if key in files:
                    raise HFTError(f"{name!r} holds {key} twice, in {files[key].name} and {file.name}: save it anew.")
                files[key] = file
    wrong = [key for key, file in listed.items() if files.get(key) != file]
    if wrong:
        raise HFTError(
            f"{name!r} has no {wrong[0]} in {listed[wrong[0]].name}, where its index says it is: save it anew."
        )
    return files


def _check_floating(saved: SavedModel) -> None:
    """Quantised weights, unlike those of a quantised config, are told by their types alone."""
    for key in saved.places:
        dtype = saved.tensor(key).dtype
        if dtype not in FULL_PRECISION:
            raise HFTError(
                f"{key} is {str(dtype).removeprefix('torch.')} in {saved.name!r}, so the model is quantised: give the "
                "full-precision model."
            )


def check_alike(base: SavedModel, tuned: SavedModel) -> None:
    """
    Check that one model can be a fine-tuned version of the other, parameter by parameter.

    Raises:
        [`HFTError`]: Naming the first difference: architecture, vocabulary, a parameter that only one has, a shape.
    """
    ours, theirs = type(base.skeleton).__name__, type(tuned.skeleton).__name__
    if ours != theirs:
        raise HFTError(f"{base.name!r} is a {ours}, {tuned.name!r} a {theirs}: give two models of one architecture.")
    ours, theirs = (len(next(saved.skeleton.get_input_embeddings().parameters())) for saved in (base, tuned))
    if ours != theirs:
        raise HFTError(
            f"{base.name!r} has a vocabulary of {ours} tokens, {tuned.name!r} one of {theirs}: give the model that the "
            "tuned one started from, with the same vocabulary."
        )
    for first, second in ((base, tuned), (tuned, base)):
        for key, place in first.places.items():
            if second.counterpart(key, place) is None:
                raise HFTError(
                    f"{first.name!r} holds {key}, to which nothing in {second.name!r} corresponds: give two models of one "
                    "architecture, saved in the same way."
                )
    for key, place in tuned.places.items():
        before = tuple(base.tensor(base.counterpart(key, place)).shape)
        after = tuple(tuned.tensor(key).shape)
        if before != after:
            raise HFTError(
                f"{place.parameter} has the shape {before} in {base.name!r} and {after} in {tuned.name!r}: give two models "
                "of one size."
            )


def _places(
    skeleton: PreTrainedModel,
    keys: Mapping[str, object],
    renamings: list[WeightRenaming],
    converters: list[WeightConverter],
    model: str,
) -> dict[str, Place]:
    """Follows each name through what transformers does with it on loading."""
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
        if name not in parameters:  # a buffer, or what the model ignores
            continue
        if pattern is None:
            places[key] = Place(parameters[name], "", "")
            continue
        converter = next(each for each in converters if pattern in each.source_patterns)
        if len(converter.target_patterns) > 1:
            raise HFTError(
                f"{key} in {model!r} holds several parameters, {name} among them, which can't be told apart in the file: "
                "load the model and save it with save_pretrained(folder, save_original_format=False) first."
            )
        piece, _ = rename_source_key(key, renamings, [])
        places[key] = Place(parameters[name], piece.removeprefix(f"{prefix}."), pattern)
    return places
