"""The reference of preference training under FSDP2: a copy of the policy, sharded layer by layer like the policy."""

from typing import Any

import torch

from hft_trl import reference
from hft_trl.backends import fsdp
from hft_trl.frozen import replicated
from hft_trl.selection import select
from hft_trl.selection.previous import selection_of
from hft_trl.weights import named_parameters


def shard(trainer: Any, copy: torch.nn.Module) -> None:
    """Shard the copy of a trainer's policy before TRL does. With `replicate_frozen` its frozen half stays whole."""
    whole: list[torch.nn.Parameter] = []
    config, args = trainer.hft_config, trainer.args
    shared = reference.why_not_shared(args, config) is None
    if fsdp.replicates_frozen(config, args) and shared and not args.precompute_ref_log_probs:
        # The policy's own selection, which is drawn later. What is left whole here is tied to the policy's then.
        drawn = select(copy, config, previous=selection_of(copy))
        names = {name for name, _ in named_parameters(copy)} - set(drawn.trainable)
        whole = replicated.parameters(copy, names)
    with replicated.left_whole(trainer.accelerator, copy, whole, move=False):
        fsdp.shard_reference(trainer.accelerator, copy)
    if args.precompute_ref_log_probs:
        # TRL hashes the state dict, and cannot read shards: `log_probs.digest` takes the place of its hash
        copy.register_state_dict_post_hook(lambda _, state_dict, *__: state_dict.clear())
