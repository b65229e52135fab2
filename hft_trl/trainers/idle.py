"""What learns but gets no gradient, such as experts that no token is routed to."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hft_trl.weights import named_parameters

logger = logging.get_logger(__name__)


class WarnOfIdleParameters(TrainerCallback):
    """
    Warns of trainable parameters without a gradient when the optimizer takes its first step.

    Only then do the parameters have the gradients of all micro-batches: FSDP2 keeps them elsewhere in between.
    """

    _looked = False

    def on_pre_optimizer_step(
        self, _: TrainingArguments, state: TrainerState, __: TrainerControl, model: torch.nn.Module, **___: Any
    ) -> None:
        if self._looked:
            return
        self._looked = True
        idle = [name for name, p in named_parameters(model) if p.requires_grad and p.grad is None]
        if idle and state.is_world_process_zero:
            logger.warning(
                f"{len(idle)} trainable parameters got no gradient in the first step, such as {idle[0]}. If they "
                "never do, keep them out of the selection with HFTConfig(exclude=[...])."
            )
