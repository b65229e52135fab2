"""Direct preference optimization with a half of the policy that learns, and a reference that is wholly frozen."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOTrainer

from hft_trl import reference
from hft_trl.trainers.mixin import HFTMixin


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
        """Create the accelerator as the parent does, and shard the reference before TRL shards it as one piece."""
        super().create_accelerator_and_postprocess()
        if self._to_shard is not None:
            from hft_trl.trainers.sharded_reference import shard

            shard(self, self._to_shard)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Compute as the parent does, on a data set beside whose file every process finds the parent's cache."""
        from hft_trl.trainers import log_probs

        dataset = log_probs.seen_by_all(dataset, Path(self.args.output_dir) / "_reference_log_probs" / name)
        if self.is_deepspeed_enabled or self._to_shard is not None:
            self._precompute_model_hash = log_probs.digest(self.ref_model or self.model)
        return super()._precompute_ref_logps(dataset, name, batch_size)
