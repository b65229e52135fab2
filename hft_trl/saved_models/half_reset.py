"""Half-Reset: set a part of a tuned model back to its base, or average both, tensor by tensor."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import CHAT_TEMPLATE_DIR, FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE
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
from hft_trl.saved_models.comparison import check_alike
from hft_trl.saved_models.saved_model import FILES, SavedModel, short
from hft_trl.selection import SELECTION_FILE, Selection, select
from hft_trl.weights import CHUNK

# Copied with the weights. A tokenizer's class names further files.
COMPANIONS = (*FILES, PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME)


def half_reset(base: str | Path, tuned: str | Path, out: str | Path, config: HFTConfig | None = None) -> Selection:
    """
    Set half of a tuned model's layers back to its base, without training and without loading models.

    The parameters that training would select stay tuned (with embedding, output head and final norm by default). All
    others become the base's, bit for bit. Buffers stay the tuned model's. Memory holds a few chunks of one tensor.

    Args:
        base (`str` or `Path`):
            The model that tuning started from: folder, hub id in the local cache, `"demo"` or `"smollm2"`.
        tuned (`str` or `Path`):
            The tuned model, named in the same way.
        out (`str` or `Path`):
            New or empty folder. It is written completely or not at all, with the tuned model's shards.
        config ([`HFTConfig`], *optional*):
            `ratio` is the share of the layers' parameters that stays tuned. `reselect` must be `"fresh"` and `method`
            `"hft"`. Strategies `"importance"` and `"element"` are rejected.

    Returns:
        [`Selection`]: What stayed tuned (`trainable`) and what was set back (`frozen`).

    Raises:
        [`HFTError`]: If the two models differ in architecture, vocabulary or shapes, if the tuned model's type cannot
            hold the base's values, or if `out` is not empty or cannot be written.
    """
    base, tuned = str(base), str(tuned)
    config = config if config is not None else HFTConfig()
    if (config.method, config.reselect) != ("hft", "fresh"):
        raise HFTError(
            f"hft.method is {config.method!r} and hft.reselect {config.reselect!r}: half-reset makes a selection of "
            "its own, so leave them at 'hft' and 'fresh'."
        )
    if config.strategy in ("importance", "element"):
        raise HFTError(
            f"hft.strategy is {config.strategy!r}, but half-reset selects whole matrices by their shapes: use "
            "category, layer or model."
        )
    before, after, out = _open(base, tuned, out)
    selection = select(after.skeleton, config)
    stays = set(selection.trainable)
    shares = {key: float(place.parameter in stays) for key, place in after.places.items()}
    _check_exact(before, after, shares)
    start = {"name_or_path": base, "weights_digest": before.digest(after.dtypes())}
    selection = dataclasses.replace(selection, start_model=start)
    with _new_folder(out) as folder:
        _write_weights(before, after, shares, folder)
        selection.save(folder)
        _write_card(folder, before, after, "Half-Reset", _reset_text(before, after, selection))
    return selection


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
    with writing(out):
        empty = out.is_dir() and not any(out.iterdir())
        taken = not empty and (out.exists() or out.is_symlink())
    if taken:
        raise HFTError(f"out {str(out)!r} exists already: choose a new folder.")
    if out.is_mount():
        raise HFTError(f"out {str(out)!r} is a mount point, which cannot be replaced: choose a new folder in it.")
    before, after = SavedModel(base), SavedModel(tuned)
    check_alike(before, after)
    _check_tokens(before, after)
    out = resolved(out)  # a link to an empty folder cannot be replaced by a folder
    here = next(path for path in out.parents if path.exists())
    needed, free = sum(path.stat().st_size for path in set(after.files.values())), shutil.disk_usage(here).free
    if free < needed:
        raise HFTError(
            f"out {str(out)!r} needs {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there: make room, or "
            "choose a folder on another disk."
        )
    return before, after, out


def _check_tokens(before: SavedModel, after: SavedModel) -> None:
    ours, theirs = _tokenizer(before), _tokenizer(after)
    if ours is None or theirs is None:
        return
    known = theirs.get_vocab()
    # A reserved token may have a new name, but no token may have another number
    for token, number in ours.get_vocab().items():
        if known.get(token, number) != number:
            raise HFTError(
                f"token {token!r} is number {number} in the vocabulary of {before.name!r} and {known[token]} in that "
                f"of {after.name!r}: give the model that the tuned one started from."
            )


def _tokenizer(saved: SavedModel) -> PreTrainedTokenizerBase | None:
    root = next(iter(saved.files.values())).parent
    if not any((root / name).is_file() for name in (FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)):
        return None
    try:
        return AutoTokenizer.from_pretrained(saved.path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):  # one that this machine cannot load
        return None


def _check_exact(before: SavedModel, after: SavedModel, shares: Mapping[str, float]) -> None:
    for key, share in shares.items():
        old, new = after.counterpart(key, before).dtype, after.tensor(key).dtype
        if share == 0 and torch.promote_types(old, new) != new:
            raise HFTError(
                f"{after.places[key].parameter} is {short(old)} in {before.name!r} and {short(new)} in {after.name!r},"
                f" which cannot hold all its values: save {after.name!r} in {short(old)} first."
            )


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` at the end, or is removed after an error."""
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        folder = temporary / out.name  # a folder of mkdtemp is accessible only to its owner
        folder.mkdir()
        yield folder
        flush(folder)
        folder.replace(out)
        sync(out.parent)
    except OSError as error:
        raise HFTError(
            f"out {str(out)!r} can't be written ({error.strerror or error}): choose another folder."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _copy_companions(after: SavedModel, folder: Path) -> None:
    root, tokenizer = next(iter(after.files.values())).parent, _tokenizer(after)
    patterns = {*COMPANIONS, *(tokenizer.vocab_files_names.values() if tokenizer is not None else ())}
    if set(after.files.values()) != {root / SAFE_WEIGHTS_NAME}:
        patterns.add(SAFE_WEIGHTS_INDEX_NAME)
    for path in {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}:
        shutil.copyfile(path, folder / path.name)
    if (root / CHAT_TEMPLATE_DIR).is_dir():
        shutil.copytree(root / CHAT_TEMPLATE_DIR, folder / CHAT_TEMPLATE_DIR)


def _write_weights(before: SavedModel, after: SavedModel, shares: Mapping[str, float], folder: Path) -> None:
    """Copy the tuned model's files with their headers, and write mixed values."""
    _copy_companions(after, folder)
    paths = sorted(set(after.files.values()))
    total = sum(path.stat().st_size for path in paths)
    with logging.tqdm(total=total, unit="B", unit_scale=True, desc="Writing", disable=None) as bar:
        for path in paths:
            header, keys = _header(path)
            with (folder / path.name).open("wb") as file:
                bar.update(file.write(header))
                for key in keys:
                    for piece in _pieces(before, after, key, shares.get(key, 1.0)):
                        bar.update(_write(file, piece))


def _header(path: Path) -> tuple[bytes, list[str]]:
    """Return a safetensors header (8 bytes of length, then JSON) and tensor names in file order."""
    with path.open("rb") as file:
        length = file.read(8)
        text = file.read(int.from_bytes(length, "little"))
    entries = json.loads(text)
    entries.pop("__metadata__", None)
    return length + text, sorted(entries, key=lambda key: entries[key]["data_offsets"])


def _pieces(before: SavedModel, after: SavedModel, key: str, share: float) -> Iterator[torch.Tensor]:
    new = after.tensor(key).reshape(-1)
    if share == 1:
        yield from new.split(CHUNK)
        return
    old = after.counterpart(key, before).reshape(-1)
    for start, end in zip(old.split(CHUNK), new.split(CHUNK), strict=True):
        mixed = start if share == 0 else torch.lerp(start.double(), end.double(), share)
        yield mixed.to(new.dtype)


def _write(file: BinaryIO, piece: torch.Tensor) -> int:
    return file.write(memoryview(piece.view(torch.uint8).numpy()))


def _reset_text(before: SavedModel, after: SavedModel, selection: Selection) -> str:
    shares = "\n".join(f"| {category} | {share:.4f} |" for category, share in selection.share.items())
    settings = ", ".join(f"{key} `{value}`" for key, value in selection.config.selecting().items())
    return f"""\
A random part of the parameters of `{after.name}` was set back to `{before.name}`, bit for bit; the rest is unchanged.
Nothing was trained. Settings: {settings}. Selection `{selection.digest}`, listed in `{SELECTION_FILE}`: its trainable
parameters stayed tuned. Half-Reset is the pilot experiment of [HFT](https://arxiv.org/abs/2404.18466).

| category | share that stayed tuned |
|---|---|
{shares}"""


def _write_card(folder: Path, before: SavedModel, after: SavedModel, title: str, text: str) -> None:
    # A card's base models are hub ids, so folders are named only in the text
    hub = [saved.name for saved in (before, after) if not Path(demo.model_path(saved.name)).exists()]
    models = [name.partition("@")[0] for name in hub] or None
    data = ModelCardData(base_model=models, library_name="transformers", tags=["hft", title.lower()])
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}\n").save(folder / "README.md")
