"""Load data sets (hub, folder, file or TRL's mixture) and quantized references."""

import dataclasses
import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError
from datasets.table import CastError
from transformers import PreTrainedModel
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, get_dataset, get_quantization_config
from trl.scripts.utils import DatasetConfig
from trl.trainer.utils import create_model_from_path

from hft_trl.backends.fsdp import sharded_by
from hft_trl.errors import HFTError, as_user_error, first_line
from hft_trl.files import is_missing
from hft_trl.saved_models.digests import content_digest

SPLIT_SEED = 42  # not a trainer's seed, so that all seeds are evaluated on the same rows
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn a library's error about data into an [`HFTError`] that names them."""
    with as_user_error(what):
        try:
            yield
        except (DatasetGenerationError, StopIteration) as error:
            cause = error.__cause__ or error
            reason = f"its files differ, {cause.details()}" if isinstance(cause, CastError) else first_line(cause)
            raise HFTError(
                f"{what} cannot be read: {reason or 'its first file has no rows, so remove it'}."
            ) from error


def load_split(source: str, split: str = "train", config: str | None = None) -> Dataset:
    """
    Load one split of a data set, and reject one that does not exist or has no rows.

    `source` is a hub id, a folder or a file, and `split` may be a part. A file, and a folder that holds a single
    `Dataset`, has the split train only.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    with _reading(f"dataset {source!r}, split {split!r}"):
        if path.is_file():
            if suffix not in FILE_FORMATS:
                raise HFTError(f"dataset {source!r} is no .jsonl, .json or .parquet file: convert it to one.")
            if path.stat().st_size == 0:
                raise HFTError(f"dataset {source!r} is empty: give one with rows.")
            if {name for name, _ in _parts(split)} != {"train"}:
                raise HFTError(
                    f"dataset {source!r} is one file, whose only split is train, but the split is {split!r}: give "
                    "parts, such as train[:95%] to train on and train[95%:] to evaluate on, or a folder with a "
                    "file for each split."
                )
            file = glob.escape(str(path.absolute()))  # it would be read as a pattern
            dataset = load_dataset(FILE_FORMATS[suffix], data_files=file, split=split)
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            dataset = _select(load_from_disk(source), split)
        elif path.is_dir():
            if glob.has_magic(str(path.resolve())):
                raise HFTError(f"dataset {source!r} has *, ? or [ in its path, which datasets cannot read: rename it.")
            # datasets does not notice changed files if the folder's README.md lists them
            cache = Path(HF_DATASETS_CACHE) / f"local-{content_digest(path)}"
            dataset = load_dataset(source, config, split=split, cache_dir=str(cache))
        elif is_missing(source) or suffix in FILE_FORMATS:
            raise HFTError(f"dataset {source!r} does not exist as a file or folder: correct the path.")
        else:
            dataset = load_dataset(source, config, split=split)
    if len(dataset) == 0:
        raise HFTError(f"dataset {source!r}, split {split!r} is empty: give one with rows.")
    return dataset


def check_apart(source: str, split: str, eval_split: str, config: str | None = None) -> None:
    """Reject evaluation on rows that are trained on."""
    both = {name for name, _ in _parts(split)} & {name for name, _ in _parts(eval_split)}
    if not both:
        return
    lengths = {name: len(load_split(source, name, config)) for name in both}
    shared = ["+".join(part for name, part in _parts(text) if name in both) for text in (split, eval_split)]
    with _reading(f"dataset {source!r}, splits {split!r} and {eval_split!r}"):
        trained, evaluated = (ReadInstruction.from_spec(text).to_absolute(lengths) for text in shared)
    if any(a.splitname == b.splitname and max(a.from_, b.from_) < min(a.to, b.to) for a in trained for b in evaluated):
        raise HFTError(
            f"dataset {source!r}: eval_split {eval_split!r} has rows of split {split!r}, and the model would be "
            "evaluated on what it learns: give parts, such as split 'train[:95%]' and eval_split 'train[95%:]', or a "
            "folder with a file for each, or set eval_strategy to 'no'."
        )


def _parts(split: str) -> list[tuple[str, str]]:
    """Return the parts of a split, such as `train[:5]`, each with its name, such as `train`."""
    return [(part.partition("[")[0].strip(), part.strip()) for part in split.split("+")]


def _select(dataset: Dataset | DatasetDict, split: str) -> Dataset:
    """Apply `split` to a data set from `load_from_disk`, as `load_dataset` does."""
    named = dataset if isinstance(dataset, DatasetDict) else DatasetDict({"train": dataset})
    lengths = {name: len(part) for name, part in named.items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, KeyError, AssertionError) as error:
        raise ValueError(f"the splits are {sorted(lengths)}: give one of them") from error
    return concatenate_datasets([named[part.splitname].select(range(part.from_, part.to)) for part in parts])


def part_of_mixture(part: DatasetConfig) -> DatasetConfig:
    """Return a part of a mixture in TRL's form if its path is a data file, which a stage's `dataset` may be too."""
    kind = FILE_FORMATS.get(Path(part.path).suffix.lower())
    if kind is None or part.data_files is not None or not Path(part.path).is_file():
        return part
    return dataclasses.replace(part, path=kind, data_files=glob.escape(part.path))


def load_mixture(mixture: DatasetMixtureConfig, split: str) -> Dataset:
    """
    Load one split of TRL's mixture of data sets, and reject a split that it does not have.

    With `test_split_size` the split is the same in every call: TRL would draw another one each time.
    """
    with _reading("the mixture of data sets"):
        parts = get_dataset(dataclasses.replace(mixture, test_split_size=None))
        if mixture.test_split_size is not None:
            parts = parts["train"].train_test_split(mixture.test_split_size, seed=SPLIT_SEED)
    if split not in parts:
        raise HFTError(
            f"the mixture has the splits {sorted(parts)}, not {split!r}: set test_split_size to make a test split."
        )
    return parts[split]


def check_quantizable(bits: str, args: DPOConfig) -> None:
    """Reject settings that a quantized reference does not support."""
    for name in ("sync_ref_model", "precompute_ref_log_probs"):
        if vars(args)[name]:
            raise HFTError(f"reference_quantization is {bits}, which {name} does not use: drop one of the two.")
    backend = sharded_by(args)
    if backend is not None:
        raise HFTError(
            f"reference_quantization is {bits}, but {backend} cannot shard a quantized reference: drop it, or use DDP."
        )


def load_quantized(model: str, bits: str, args: DPOConfig) -> PreTrainedModel:
    """Load a model in 8 bits (LLM.int8) or 4 bits (NF4). Head, embeddings and norms are not quantized."""
    compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    config = get_quantization_config(ModelConfig(dtype=compute, **{f"load_in_{bits}": True}))
    given = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    place = {"": PartialState().device}
    return create_model_from_path(model, **{**given, "quantization_config": config, "device_map": place})
