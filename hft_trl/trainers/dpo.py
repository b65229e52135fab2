"""Train a half of the policy with direct preference optimization. The reference stays frozen."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import fsdp2_prepare_model
from datasets import Dataset, is_caching_enabled, load_from_disk
from datasets.config import DATASET_STATE_JSON_FILENAME
from trl import DPOTrainer

from hft_trl import reference
from hft_trl.errors import HFTError
from hft_trl.processes import all_see
from hft_trl.trainers.mixin import HFTMixin
from hft_trl.weights import combined_digest, fingerprints, named_parameters


class HFTDPOTrainer(HFTMixin, DPOTrainer):
    """
    [`~trl.DPOTrainer`] that trains a half of the policy. The reference stays wholly frozen.

    In one process and under DDP the frozen half of policy and reference is stored once, and the reference is a copy of
    the policy instead of a second load. `HFTConfig(share_reference=False)` leaves the reference to TRL. Under FSDP2 it
    is such a copy too, sharded layer by layer like the policy. With `HFTConfig(replicate_frozen=True)` the policy's
    frozen half serves both.
    """

    _to_shard: torch.nn.Module | None = None

    @contextmanager
    def _reference_from_policy(self, given: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
        with reference.loaded_once(given, self.hft_config) as loaded:
            if loaded is not None and not reference.is_hollow(loaded["ref_model"]):
                self._to_shard = loaded["ref_model"]
            yield loaded
        if self.args.precompute_ref_log_probs:
            self.accelerator.print("reference: its log-probs were computed before training, and it is not kept.")
            if self._to_shard is not None:
                self.ref_model = None  # as TRL does with a reference of its own
        self._to_shard = None

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator as the parent does, after sharding the reference layer by layer."""
        super().create_accelerator_and_postprocess()
        if (copy := self._to_shard) is None:
            return
        from hft_trl.backends.fsdp import replicates_frozen
        from hft_trl.frozen import replicated
        from hft_trl.selection import select
        from hft_trl.selection.previous import selection_of

        config, args, whole = self.hft_config, self.args, []
        shared = reference.why_not_shared(args, config) is None
        if replicates_frozen(config, args) and shared and not args.precompute_ref_log_probs:
            # The policy's own selection, which is drawn later. What is left whole here is tied to the policy's then.
            drawn = select(copy, config, previous=selection_of(copy, self._revision))
            whole = replicated.parameters(copy, dict(named_parameters(copy)).keys() - set(drawn.trainable))
        with replicated.left_whole(self.accelerator, copy, whole, move=False):
            fsdp2_prepare_model(self.accelerator, copy)
        # accelerate keeps the head gathered for the backward pass, which a reference does not have
        copy.set_reshard_after_forward(True)
        if args.precompute_ref_log_probs:
            # TRL hashes the state dict, and cannot read shards: a digest of the parameters takes the place of its hash
            copy.register_state_dict_post_hook(lambda _, state_dict, *__: state_dict.clear())

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Compute as the parent does, on a data set beside whose file every process finds the parent's cache."""
        dataset = seen_by_all(dataset, Path(self.args.output_dir) / "_reference_log_probs" / name)
        if self.is_deepspeed_enabled or self._to_shard is not None:
            # TRL names its cache after the bytes of the state dict, which ZeRO-3 and shards of FSDP2 do not have
            digests = fingerprints(named_parameters(self.ref_model or self.model))
            self._precompute_model_hash = combined_digest(digests)
        return super()._precompute_ref_logps(dataset, name, batch_size)


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
