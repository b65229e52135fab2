"""Trainers of the peers of HFT: stock TRL with all, half or an adapter of the weights, or with BAdam's optimizer."""

from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig
from step_run import LORA
from transformers import PreTrainedModel
from trl import SFTTrainer

from hft_trl import HFTConfig, HFTError, HFTSFTTrainer

PEERS = {
    "fft": "all of the model",
    "hft": "half of each category, embedding, head and final norm (ours)",
    "last_half": "all but the last half of the layers",
    "lora": "adapters of rank 8 beside every linear layer but the head",
    "badam": "one layer at a time (BAdam as its README has it)",
    "badam_all": "one layer, the embedding, or head and final norm at a time (BAdam)",
}
"""What learns, by peer."""


class BAdamTrainer(SFTTrainer):
    """[`~trl.SFTTrainer`] whose optimizer is wrapped in `badam.BlockOptimizer`, as in BAdam's README."""

    def __init__(self, *args: Any, badam: dict[str, Any], **kwargs: Any) -> None:
        self.badam = badam
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        from badam import BlockOptimizer

        if self.optimizer is None:
            parameters = list((self.model if model is None else model).named_parameters())
            self.optimizer = BlockOptimizer(super().create_optimizer(model), parameters, **self.badam)
        return self.optimizer


def check_packages(peers: list[str]) -> None:
    """Raise [`HFTError`] before hours of training if BAdam is asked for and not installed."""
    if any(peer.startswith("badam") for peer in peers) and find_spec("badam") is None:
        raise HFTError(
            "the peer badam needs its own package, which is not installed: pip install -c constraints.txt -e "
            "'.[peers]', or leave it out with --peers."
        )


def freeze_last_half(model: PreTrainedModel) -> None:
    """Freeze the last half of a model's layers; embedding, head and final norm learn, as they do in HFT."""
    layers = model.base_model.layers
    for layer in layers[len(layers) // 2 :]:
        layer.requires_grad_(False)


def number_of_blocks(peer: str, model: PreTrainedModel) -> int:
    """Number of BAdam's blocks: the layers, and with `badam_all` the embedding, and head and final norm together."""
    return model.config.num_hidden_layers + 2 * (peer == "badam_all")


def make_trainer(peer: str, half: HFTConfig, badam: dict[str, Any], **given: Any) -> SFTTrainer:
    """Make a peer's trainer. `given` are the arguments of [`~trl.SFTTrainer`], `model` a model, not a name."""
    if peer == "hft":
        return HFTSFTTrainer(**given, hft_config=half)
    if peer == "lora":
        return SFTTrainer(**given, peft_config=LoraConfig(**LORA))
    if peer.startswith("badam"):
        ends = peer == "badam_all"
        return BAdamTrainer(**given, badam={**badam, "include_embedding": ends, "include_lm_head": ends})
    if peer == "last_half":
        freeze_last_half(given["model"])
    return SFTTrainer(**given)


def optimizer_tensors(trainer: SFTTrainer) -> list[torch.Tensor]:
    """Tensors of the optimizer beside the weights: its state, and BAdam's float32 copies of the trained block."""
    optimizer = trainer.optimizer.optimizer  # within accelerate's
    copies = []
    if isinstance(trainer, BAdamTrainer):
        copies = list(optimizer.param_idx2hp.values())
        optimizer = optimizer.base_optimizer
    values = [value for entry in optimizer.state.values() for value in entry.values()]
    return [*copies, *(value for value in values if isinstance(value, torch.Tensor))]
