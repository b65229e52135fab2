"""Train a half of the model with supervised fine-tuning."""

from trl import SFTTrainer

from hft_trl.trainers.mixin import HFTMixin


class HFTSFTTrainer(HFTMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] that trains a half of the model.

    Example:

    ```python
    from hft_trl import HFTConfig, HFTSFTTrainer

    trainer = HFTSFTTrainer(model="Qwen/Qwen3-0.6B", train_dataset=dataset, hft_config=HFTConfig(ratio=0.5))
    trainer.train()
    ```
    """
