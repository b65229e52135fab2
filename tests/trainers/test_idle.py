"""Trainable parameters without a gradient are named once, when the gradients of a whole step exist."""

import logging

import pytest
import torch
from training import sft_trainer

from hft_trl import HFTConfig, HFTSFTTrainer


class Late(torch.nn.Module):
    """Adds nothing to a loss, and gives its parameter a gradient in the second micro-batch only."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.calls = 0

    def forward(self, loss):
        self.calls += 1
        return loss + 0 * self.weight.sum() if self.calls == 2 else loss


@pytest.mark.parametrize(("method", "accumulated", "said"), [("hft", 1, 1), ("hft", 2, 1), ("fft", 1, 0)])
def test_only_what_no_micro_batch_reaches_is_named(
    base, tulu, tmp_path, caplog, monkeypatch, method, accumulated, said
):
    hft = HFTConfig(ratio=1.0, method=method)
    settings = {"max_steps": 2, "gradient_accumulation_steps": accumulated}
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, hft, **settings)
    trainer.model.register_parameter("unused", torch.nn.Parameter(torch.ones(1)))
    if accumulated > 1:
        late = trainer.model.late = Late()
        compute = trainer.compute_loss

        def compute_loss(*args, **kwargs):
            return late(compute(*args, **kwargs))

        trainer.compute_loss = compute_loss
    monkeypatch.setattr(logging.getLogger("hft_trl"), "propagate", True)
    trainer.train()
    assert caplog.text.count("1 trainable parameters got no gradient in the first step, such as unused") == said
    assert caplog.text.count("got no gradient") == said
