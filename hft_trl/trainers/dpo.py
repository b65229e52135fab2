"""Direct preference optimisation with a half of the policy that learns, and a reference that is wholly frozen."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOTrainer

from hft_trl.backends import fsdp
from hft_trl.checkpoints.whole import selection_of
from hft_trl.config import HFTConfig
from hft_trl.frozen import replicated
from hft_trl.reference import log_probs, sharing
from hft_trl.selection import select
from hft_trl.trainers.mixin import HFTMixin
from hft_trl.weights import named_parameters


class HFTDPOTrainer(HFTMixin, DPOTrainer):
    """
    [`~trl.DPOTrainer`] that trains a half of the policy. The reference stays wholly frozen.

    In one process and under DDP the frozen half of policy and reference is stored once, and the reference is a copy of
    the policy instead of a second load. `HFTConfig(share_reference=False)` leaves the reference to TRL. Under FSDP2 it is
    such a copy too, sharded layer by layer like the policy. With `HFTConfig(replicate_frozen=True)` the policy's frozen half
    serves both.
    """

    def __init__(self, *args: Any, hft_config: HFTConfig | None = None, **kwargs: Any) -> None:
        self._to_shard: torch.nn.Module | None = None
        super().__init__(*args, hft_config=hft_config, **kwargs)
        if self.args.precompute_ref_log_probs:
            self.accelerator.print("reference: its log-probs were computed before training, and it is not kept.")

    @contextmanager
    def _policy_loaded_once(self, given: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
        with sharing.loaded_once(given, self.hft_config) as loaded:
            if loaded is not None and fsdp.fsdp_version(loaded["args"]) == 2:
                self._to_shard = loaded["ref_model"]
            yield loaded
        if self._to_shard is not None and self.args.precompute_ref_log_probs:
            self.ref_model = None  # as TRL does with a reference of its own
        self._to_shard = None

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator as the parent does, and shard the reference before TRL shards it as one piece."""
        super().create_accelerator_and_postprocess()
        if self._to_shard is not None:
            whole: list[torch.nn.Parameter] = []
            shared = sharing.why_not_shared(self.args, self.hft_config) is None
            if self._replicates and shared and not self.args.precompute_ref_log_probs:
                # The policy's own selection, which is drawn later. What is left whole here is tied to the policy's then.
                drawn = select(self._to_shard, self.hft_config, previous=selection_of(self._to_shard))
                names = {name for name, _ in named_parameters(self._to_shard)} - set(drawn.trainable)
                whole = replicated.parameters(self._to_shard, names)
            with replicated.left_whole(self.accelerator, self._to_shard, whole, move=False):
                fsdp.shard_reference(self.accelerator, self._to_shard)
            if self.args.precompute_ref_log_probs:
                log_probs.make_hashable(self._to_shard)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Compute as the parent does, on a data set beside whose file every process finds the parent's cache."""
        dataset = log_probs.seen_by_all(dataset, Path(self.args.output_dir) / "_reference_log_probs" / name)
        if self.is_deepspeed_enabled:
            self._precompute_model_hash = log_probs.digest(self.ref_model or self.model)
        return super()._precompute_ref_logps(dataset, name, batch_size)
