"""The hub's token, which a recipe hands to the hub's library by the environment and to nothing that is saved."""

import os

from trl import DPOConfig, SFTConfig

from hft_trl.errors import HFTError


def tokens_to_environment(args: SFTConfig | DPOConfig) -> None:
    """
    Move the hub's token out of a trainer's arguments into the variable `HF_TOKEN`, where the hub's library looks for it.

    transformers pickles the arguments beside each model and checkpoint, and trackers write them down.

    Args:
        args ([`~trl.SFTConfig`] or [`~trl.DPOConfig`]):
            The arguments, changed in place.

    Raises:
        [`HFTError`]: If they hold two different tokens.
    """
    found = {}
    if args.hub_token:
        found["hub_token"] = args.hub_token
        args.hub_token = None
    if args.model_init_kwargs:
        kept = dict(args.model_init_kwargs)
        for name in ("token", "use_auth_token"):
            if isinstance(kept.get(name), str):
                found[f"model_init_kwargs.{name}"] = kept.pop(name)
        args.model_init_kwargs = kept
    if len(set(found.values())) > 1:
        raise HFTError(f"{' and '.join(found)} are two different tokens: give one that may read and write.")
    if found:
        os.environ["HF_TOKEN"] = next(iter(found.values()))
