"""Half-Reset: set a part of a tuned model back to its base, or average both, tensor by tensor."""

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.tokenization_utils_base import CHAT_TEMPLATE_DIR
from transformers.utils import (
    FEATURE_EXTRACTOR_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    logging,
)

from hft_trl import demo
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.files import flush, resolved, sync, writing
from hft_trl.saved_models.comparison import change, check_alike
from hft_trl.saved_models.model_card import described
from hft_trl.saved_models.saved_model import FILES, SavedModel, short
from hft_trl.selection import SELECTION_FILE, Selection, select
from hft_trl.weights import CHUNK

# Copied with the weights
COMPANIONS = (*FILES, PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME)


def half_reset(base: str | Path, tuned: str | Path, out: str | Path, config: HFTConfig | None = None) -> Selection:
    """
    Set half of a tuned model's layers back to its base, without training and without loading models.

    The parameters that training would select stay tuned (with embedding, output head and final norm by default). All
    others become the base's, bit for bit. Buffers stay the tuned model's. Memory holds at most one file's tensors.

    Args:
        base (`str` or `Path`):
            The model that tuning started from: folder, hub id in the local cache, `"demo"` or `"smollm2"`.
        tuned (`str` or `Path`):
            The tuned model, named in the same way.
        out (`str` or `Path`):
            New or empty folder. It is written completely or not at all, with the tuned model's shards.
        config ([`HFTConfig`], *optional*):
            `ratio` is the share of the layers' parameters that stays tuned. `reselect` must be `"fresh"` and `method`
            `"hft"`. Strategies `"importance"` and `"element"` are rejected. If the tuned model was trained with the
            same half, the next seed is taken: resetting what was frozen would change nothing.

    Returns:
        [`Selection`]: What stayed tuned (`trainable`) and what was set back (`frozen`).

    Raises:
        [`HFTError`]: If the two models differ in architecture, vocabulary or shapes, if the tuned model's type cannot
            hold the base's values, or if `out` is not empty or cannot be written.
    """
    return reset(base, tuned, out, config)[0]


def reset(
    base: str | Path, tuned: str | Path, out: str | Path, config: HFTConfig | None = None
) -> tuple[Selection, int]:
    """Do what [`half_reset`] does, and return also the number of changed bytes."""
    base, tuned = str(base), str(tuned)
    config = config if config is not None else HFTConfig()
    chosen, possible = (config.method, config.reselect, config.strategy), ("category", "layer", "model")
    if chosen[:2] != ("hft", "fresh") or config.strategy not in possible:
        raise HFTError(
            f"hft.method, hft.reselect and hft.strategy are {chosen}, but half-reset selects whole matrices by their "
            f"shapes: use 'hft', 'fresh', and one of {', '.join(possible)}."
        )
    before, after, out = _open(base, tuned, out)
    selection, root = select(after.skeleton, config), next(iter(after.files.values())).parent
    trained = Selection.load(root) if (root / SELECTION_FILE).is_file() else None
    while trained is not None and trained.trainable == selection.trainable and selection.frozen and config.ratio < 1:
        # What would be set back was frozen in training, and nothing would change
        config = dataclasses.replace(config, seed=config.seed + 1)
        selection = select(after.skeleton, config)
    stays = set(selection.trainable)
    shares = {key: float(place.parameter in stays) for key, place in after.places.items()}
    for key, place in after.places.items():
        old, new = after.counterpart(key, before).dtype, after.tensor(key).dtype
        if not shares[key] and torch.promote_types(old, new) != new:
            raise HFTError(
                f"{place.parameter} is {short(old)} in {base!r} and {short(new)} in {tuned!r}, which cannot hold all "
                f"its values: save {tuned!r} in {short(old)} first."
            )
    start = {"name_or_path": base, "weights_digest": before.digest(after.dtypes())}
    selection = dataclasses.replace(selection, start_model=start)
    with _new_folder(out) as folder:
        changed = _write_weights(before, after, shares, folder)
        selection.save(folder)
        text = (
            f"A random part of the parameters of `{tuned}` was set back to `{base}`, bit for bit; the rest is "
            f"unchanged. Nothing was trained; {changed:,} bytes changed. Half-Reset is the pilot experiment of "
            f"[HFT](https://arxiv.org/abs/2404.18466).\n\n{described(selection, 'stayed tuned')}"
        )
        _write_card(folder, before, after, "Half-Reset", text)
    return selection, changed


def blend(base: str | Path, tuned: str | Path, out: str | Path, share: float) -> None:
    """
    Average all parameters of a tuned model and its base, as a baseline for Half-Reset.

    Values are `(1 - share) * base + share * tuned` with `share` in [0, 1], computed in float64 and rounded to the
    tuned model's type. Arguments and errors are those of [`half_reset`], except that types may differ.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise HFTError(f"blend is {share!r}: it must be a number in [0, 1], such as 0.5.")
    base, tuned = str(base), str(tuned)
    before, after, out = _open(base, tuned, out)
    text = (
        f"Every parameter is {1 - share:g} times that of `{base}` plus {share:g} times that of `{tuned}`. Nothing was "
        "trained."
    )
    with _new_folder(out) as folder:
        _write_weights(before, after, dict.fromkeys(after.places, float(share)), folder)
        _write_card(folder, before, after, "Blend", text)


def _open(base: str, tuned: str, out: str | Path) -> tuple[SavedModel, SavedModel, Path]:
    """Return both models and the resolved folder, after all checks that need no writing."""
    out = Path(out)
    with writing(out, resumes=False):
        empty = out.is_dir() and not any(out.iterdir())
        taken = not empty and (out.exists() or out.is_symlink())
    if taken:
        raise HFTError(f"out {str(out)!r} exists already: choose a new folder.")
    if out.is_mount():
        raise HFTError(f"out {str(out)!r} is a mount point, which cannot be replaced: choose a new folder in it.")
    before, after = SavedModel(base), SavedModel(tuned)
    check_alike(before, after)
    return before, after, resolved(out)  # a link to an empty folder cannot be replaced by a folder


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` at the end, or is removed after an error."""
    with writing(out, resumes=False):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            folder = Path(temporary, out.name)  # the temporary folder itself is accessible only to its owner
            folder.mkdir()
            yield folder
            flush(folder)
            folder.replace(out)
            sync(out.parent)


def _write_weights(before: SavedModel, after: SavedModel, shares: Mapping[str, float], folder: Path) -> int:
    """
    Write the tuned model's files with mixed values, and return the number of changed bytes.

    `shares` are those of the tuned values.
    """
    changed = 0
    paths = sorted(set(after.files.values()))
    root = paths[0].parent
    patterns = [*COMPANIONS, *([SAFE_WEIGHTS_INDEX_NAME] if paths != [root / SAFE_WEIGHTS_NAME] else [])]
    for path in {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}:
        shutil.copyfile(path, folder / path.name)
    if (root / CHAT_TEMPLATE_DIR).is_dir():
        shutil.copytree(root / CHAT_TEMPLATE_DIR, folder / CHAT_TEMPLATE_DIR)
    for path in logging.tqdm(paths, desc="Writing", disable=None):
        with safe_open(path, framework="pt") as opened:
            keys, metadata = opened.keys(), opened.metadata()
        tensors: dict[str, torch.Tensor] = {}
        for key in keys:
            new, share = after.tensor(key), shares.get(key, 1.0)
            if share != 1:
                old = after.counterpart(key, before)
                tuned, new = new, _mixed(old, new, share) if share else old.to(new.dtype, copy=after.is_repeated(key))
                changed += change(tuned, new).moved * new.element_size()
            tensors[key] = new
        save_file(tensors, folder / path.name, metadata)
    return changed


def _mixed(old: torch.Tensor, new: torch.Tensor, share: float) -> torch.Tensor:
    """Return `(1 - share) * old + share * new` in the type of `new`, computed in float64 piece by piece."""
    pieces = zip(old.reshape(-1).split(CHUNK), new.reshape(-1).split(CHUNK), strict=True)
    return torch.cat([torch.lerp(a.double(), b.double(), share).to(new.dtype) for a, b in pieces]).view(new.shape)


def _write_card(folder: Path, before: SavedModel, after: SavedModel, title: str, text: str) -> None:
    # A card's base models are hub ids, so folders are named only in the text
    models = [saved.name.partition("@")[0] for saved in (before, after) if demo.on_hub(saved.name)] or None
    data = ModelCardData(base_model=models, library_name="transformers", tags=["hft", title.lower()])
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}\n").save(folder / "README.md")
