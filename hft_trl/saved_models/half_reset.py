"""Half-Reset: set a part of a tuned model back to its base, or average both, tensor by tensor."""

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import utils
from transformers.tokenization_utils_base import CHAT_TEMPLATE_DIR

from hft_trl import demo
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.files import flush, resolved, sync, write_json, writing
from hft_trl.saved_models.diff import change, check_alike
from hft_trl.saved_models.model_card import described
from hft_trl.saved_models.saved_model import FILES, SavedModel, short
from hft_trl.selection import Selection, select
from hft_trl.selection.previous import selection_of
from hft_trl.weights import CHUNK, rounds

COMPANIONS = (*FILES, utils.PROCESSOR_NAME, utils.FEATURE_EXTRACTOR_NAME)  # copied with the weights
SEEDS = 100  # tried for another half than the one that was trained


def half_reset(base: str | Path, tuned: str | Path, out: str | Path, config: HFTConfig | None = None) -> Selection:
    """
    Set half of a tuned model's layers back to its base, without training and without loading models.

    The parameters that training would select stay tuned (with embedding, output head and final norm by default). All
    others become the base's, bit for bit. Buffers stay the tuned model's. Memory holds at most one file's tensors.

    Args:
        base (`str` or `Path`): The model that tuning started from: folder, hub id in the local cache, `"demo"` or
            `"smollm2"`.
        tuned (`str` or `Path`): The tuned model, named in the same way.
        out (`str` or `Path`): New or empty folder. It is written whole or not at all, with the tuned model's shards.
        config ([`HFTConfig`], *optional*): `ratio` is the share of the layers' parameters that stays tuned. `reselect`
            must be `"fresh"` and `method` `"hft"`. Strategies `"importance"` and `"element"` are rejected. If the
            tuned model was trained with the same half, the next seed is taken: otherwise nothing would change.

    Returns:
        [`Selection`]: What stayed tuned (`trainable`) and what was set back (`frozen`).

    Raises:
        [`HFTError`]: If the two models differ in architecture, vocabulary or shapes, if the tuned model's type cannot
            hold the base's values, or if `out` is not empty or cannot be written.
    """
    return reset(base, tuned, out, config)[0]


def reset(base: str | Path, tuned: str | Path, out: str | Path, config: HFTConfig | None) -> tuple[Selection, int]:
    """Do what [`half_reset`] does, and return also the number of changed bytes."""
    config = config if config is not None else HFTConfig()
    chosen, possible = (config.method, config.reselect, config.strategy), ("category", "layer", "model")
    if chosen[:2] != ("hft", "fresh") or config.strategy not in possible:
        raise HFTError(
            f"hft.method, hft.reselect and hft.strategy are {chosen}, but half-reset selects whole matrices by their "
            f"shapes: use 'hft', 'fresh', and one of {', '.join(possible)}."
        )
    before, after, out = open_models(base, tuned, out)
    selection = draw(after, config)
    stays, old, new = set(selection.trainable), before.dtypes, after.dtypes
    for name in after.parameters:
        if name not in stays and rounds(old[name], new[name]):
            raise HFTError(
                f"{name} is {short(old[name])} in {before.name!r} and {short(new[name])} in {after.name!r}, which "
                f"cannot hold all its values: save {after.name!r} in {short(old[name])} first."
            )
    return write_half(before, after, out, selection)


def draw(after: SavedModel, config: HFTConfig) -> Selection:
    """Select what stays tuned: with the next seed if the model was trained with the same half."""
    trained = selection_of(after.skeleton)
    for seed in range(config.seed, config.seed + SEEDS):
        selection = select(after.skeleton, dataclasses.replace(config, seed=seed))
        # What would be set back was frozen in training, and nothing would change
        if trained is None or trained.trainable != selection.trainable or not selection.frozen or config.ratio == 1:
            return selection
    raise HFTError(
        f"hft.ratio is {config.ratio}, at which {SEEDS} seeds select the half that {after.name!r} was trained with, "
        "so nothing would change: choose another ratio."
    )


def write_half(
    before: SavedModel, after: SavedModel, out: Path, half: Selection, record: Any = None
) -> tuple[Selection, int]:
    """Write a Half-Reset, and return its selection and the number of changed bytes."""
    start = {"name_or_path": before.name, "weights_digest": before.digest(after.dtypes)}
    selection = dataclasses.replace(half, start_model=start)
    text = (
        f"A random part of the parameters of `{after.name}` was set back to `{before.name}`, bit for bit; the rest is "
        "unchanged. Half-Reset is the pilot experiment of [HFT](https://arxiv.org/abs/2404.18466).\n\n"
        f"{described(selection, 'stayed tuned')}"
    )
    shares = dict.fromkeys(after.parameters, 0.0) | dict.fromkeys(selection.trainable, 1.0)
    return selection, write(before, after, out, shares, text, selection, record)


def average(base: str | Path, tuned: str | Path, out: str | Path, weight: float) -> None:
    """Write `(1 - weight) * base + weight * tuned`, computed in float64, in the tuned model's types."""
    check_weight(weight)
    write_average(*open_models(base, tuned, out), weight)


def write_average(before: SavedModel, after: SavedModel, out: Path, weight: float, record: Any = None) -> None:
    """Write an average. `record` is as in [`write`]."""
    text = f"Every parameter is {1 - weight:g} times that of `{before.name}` plus {weight:g} times that of "
    write(before, after, out, dict.fromkeys(after.parameters, weight), f"{text}`{after.name}`.", record=record)


def check_weight(weight: float) -> None:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise HFTError(f"weight is {weight!r}: it must be a number in [0, 1], such as 0.5.")


def open_models(base: str | Path, tuned: str | Path, out: str | Path) -> tuple[SavedModel, SavedModel, Path]:
    """Return both models and the resolved folder, after all checks that need no writing."""
    out = Path(out)
    with writing(out, resumes=False):
        empty = out.is_dir() and not any(out.iterdir())
        taken = not empty and (out.exists() or out.is_symlink())
    if taken:
        raise HFTError(f"out {str(out)!r} exists already: choose a new folder.")
    if out.is_mount():
        raise HFTError(f"out {str(out)!r} is a mount point, which cannot be replaced: choose a new folder in it.")
    before, after = SavedModel(str(base)), SavedModel(str(tuned))
    check_alike(before, after)
    return before, after, resolved(out)  # a link to an empty folder cannot be replaced by a folder


def write(
    before: SavedModel,
    after: SavedModel,
    out: Path,
    shares: Mapping[str, float],
    text: str,
    selection: Selection | None = None,
    record: Any = None,
) -> int:
    """
    Write a mixture whole or not at all, and return the number of changed bytes.

    `shares` are those of the tuned values, by parameter.
    """
    title = "Average" if selection is None else "Half-Reset"
    with writing(out, resumes=False):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            folder = Path(temporary, out.name)  # the temporary folder itself is accessible only to its owner
            folder.mkdir()
            changed = _write_weights(before, after, shares, folder)
            if selection is not None:
                selection.save(folder)
            if record is not None:
                write_json(folder / "repair.json", record)
            # A card's base models are hub ids, so folders are named only in the text
            models = [saved.name.partition("@")[0] for saved in (before, after) if demo.on_hub(saved.name)] or None
            data = ModelCardData(base_model=models, library_name="transformers", tags=["hft", title.lower()])
            nothing = f"Nothing was trained; {changed:,} bytes changed."
            ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{nothing} {text}\n").save(folder / "README.md")
            flush(folder)
            folder.replace(out)
            sync(out.parent)
    return changed


def _write_weights(before: SavedModel, after: SavedModel, shares: Mapping[str, float], folder: Path) -> int:
    """Write the tuned model's files with mixed values, and return the number of changed bytes."""
    changed = 0
    paths = sorted(set(after.files.values()))
    root = paths[0].parent
    sharded = paths != [root / utils.SAFE_WEIGHTS_NAME]
    patterns = [*COMPANIONS, *([utils.SAFE_WEIGHTS_INDEX_NAME] if sharded else [])]
    for path in {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}:
        shutil.copyfile(path, folder / path.name)
    if (root / CHAT_TEMPLATE_DIR).is_dir():
        shutil.copytree(root / CHAT_TEMPLATE_DIR, folder / CHAT_TEMPLATE_DIR)
    for path in utils.logging.tqdm(paths, desc="Writing", disable=None):
        with safe_open(path, framework="pt") as opened:
            keys, metadata = opened.keys(), opened.metadata()
        tensors: dict[str, torch.Tensor] = {}
        for key in keys:
            tensors[key] = tuned = after.tensor(key)
            if key in after.places and (share := shares[after.places[key].parameter]) != 1:
                new = mixed(after.counterpart(key, before), tuned, share)
                changed += change(tuned, new).moved * new.element_size()
                # Of a tied parameter, the base's file may hold one tensor where this one holds two
                tensors[key] = new.clone() if after.is_repeated(key) else new
        save_file(tensors, folder / path.name, metadata)
    return changed


def mixed(old: torch.Tensor, new: torch.Tensor, share: float) -> torch.Tensor:
    """Return `(1 - share) * old + share * new` in the type of `new`, computed in float64 piece by piece."""
    if share in (0, 1):
        return new if share else old.to(new.dtype)
    pieces = zip(old.reshape(-1).split(CHUNK), new.reshape(-1).split(CHUNK), strict=True)
    return torch.cat([torch.lerp(a.double(), b.double(), share).to(new.dtype) for a, b in pieces]).view(new.shape)
