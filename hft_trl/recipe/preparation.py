"""All that is done before the first stage of a recipe trains, so that a mistake in any stage costs no training."""

from collections.abc import Sequence

from hft_trl.recipe.activation_checkpointing import settle_checkpointing
from hft_trl.recipe.folder import open_stages
from hft_trl.recipe.rehearsal import rehearse
from hft_trl.recipe.stage import Stage


def prepare(stages: Sequence[Stage], overwrite: bool = False) -> None:
    """
    Check all stages, load their data, rehearse them, and open their folders. Every process has to call.

    Args:
        stages (`Sequence[Stage]`):
            All stages of the run, in order.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to remove what earlier runs left in the stages' folders.

    Raises:
        [`HFTError`]: Naming the first thing that is wrong. Nothing is removed or written before all is found right.
    """
    for stage in stages:
        stage.check()
    for stage in stages:
        stage.load_data()
    rehearse(stages)
    settle_checkpointing(*stages)
    open_stages(stages, overwrite)
