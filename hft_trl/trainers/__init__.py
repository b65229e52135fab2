"""TRL's trainers with a half that learns: thin subclasses over one mixin."""

from hft_trl.trainers.dpo import HFTDPOTrainer
from hft_trl.trainers.mixin import HFTMixin
from hft_trl.trainers.sft import HFTSFTTrainer

__all__ = ["HFTDPOTrainer", "HFTMixin", "HFTSFTTrainer"]
