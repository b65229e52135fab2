"""Log-probs of the reference that are computed before training, by several processes and sharded models too."""

from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, is_caching_enabled, load_from_disk
from datasets.config import DATASET_STATE_JSON_FILENAME

from hft_trl.errors import HFTError
from hft_trl.processes import all_see
from hft_trl.weights import combined_digest, fingerprints, named_parameters


def digest(model: torch.nn.Module) -> str:
    """
    Return a digest of all parameters of a model, whole or sharded. Every process has to call.

    TRL names its cache of log-probs after the bytes of the state dict, which ZeRO-3 and shards of FSDP2 do not have:
    log-probs of a model that was trained again into the same folder would be reused.
    """
    return combined_digest(fingerprints(named_parameters(model)))


def seen_by_all(dataset: Dataset, folder: Path) -> Dataset:
    """
    Return a data set whose file every process sees, so that all find what one of them caches beside it.

    A data set in memory, or in a cache on the disk of one machine, is written to a folder that all processes share.
    """
    state = PartialState()
    if state.num_processes == 1 or not isinstance(dataset, Dataset):
        return dataset
    if not is_caching_enabled():
        raise HFTError(
            f"precompute_ref_log_probs is on in {state.num_processes} processes, which share the log-probs through "
            "datasets' cache, but caching is off: call datasets.enable_caching(), or use one process."
        )
    file = Path(dataset.cache_files[0]["filename"]) if dataset.cache_files else None
    if all_see(file):
        return dataset
    if state.is_main_process:
        dataset.save_to_disk(str(folder))
    state.wait_for_everyone()
    if not all_see(folder / DATASET_STATE_JSON_FILENAME):
        raise HFTError(
            f"precompute_ref_log_probs: not every process sees {str(folder)!r}: put output_dir on a file system that "
            "all machines share."
        )
    return load_from_disk(str(folder))
