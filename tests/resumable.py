"""The HFT trainers with exact resume, as recipes build them."""

from hft_trl import HFTDPOTrainer, HFTSFTTrainer, ResumableMixin


class ResumableSFTTrainer(ResumableMixin, HFTSFTTrainer):
    """SFT."""


class ResumableDPOTrainer(ResumableMixin, HFTDPOTrainer):
    """DPO."""
