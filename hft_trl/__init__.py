"""Half Fine-Tuning (HFT) for TRL: a random half of every layer learns, the other half keeps its bits."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError, as_user_error, exit_on_user_error

if TYPE_CHECKING:
    from hft_trl.checkpoints.resumable import ResumableMixin
    from hft_trl.retention.callback import RetentionCallback
    from hft_trl.saved_models.half_reset import half_reset
    from hft_trl.selection import Selection, select
    from hft_trl.trainers import HFTDPOTrainer, HFTSFTTrainer
    from hft_trl.trainers.mixin import HFTMixin

__all__ = [
    "HFTConfig",
    "HFTDPOTrainer",
    "HFTError",
    "HFTMixin",
    "HFTSFTTrainer",
    "ResumableMixin",
    "RetentionCallback",
    "Selection",
    "as_user_error",
    "exit_on_user_error",
    "half_reset",
    "select",
]

# bitsandbytes warns at its import of a 4-bit CPU kernel that is not there. HFT has no use for it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Loaded when first asked for, so that `import hft_trl` and `hft-trl --help` need neither torch nor TRL.
_HOMES = {
    "Selection": "hft_trl.selection",
    "select": "hft_trl.selection",
    "half_reset": "hft_trl.saved_models.half_reset",
    "HFTDPOTrainer": "hft_trl.trainers",
    "HFTMixin": "hft_trl.trainers.mixin",
    "HFTSFTTrainer": "hft_trl.trainers",
    "ResumableMixin": "hft_trl.checkpoints.resumable",
    "RetentionCallback": "hft_trl.retention.callback",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
