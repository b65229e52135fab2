"""Train with Gradient Episodic Memory (GEM): no step may increase the loss on earlier tasks' memories."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from trl import SFTConfig

from hft_trl.backends.fsdp import sharded_by
from hft_trl.checkpoints.resumable import ResumableMixin
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.trainers import HFTSFTTrainer
from hft_trl.trainers.compatibility import reentrant

# Smallest multiplier of a memory's gradient in a projected step (the value of TRACE and of GEM's authors)
MARGIN = 0.5
# Added to the squared norm of each memory's gradient, relative to it: the solver needs a positive definite matrix
EPSILON = 1e-4


class GEMTrainer(ResumableMixin, HFTSFTTrainer):
    """
    Train with Gradient Episodic Memory (https://huggingface.co/papers/1706.08840), without sharding.

    Each step's gradient is projected so that its product with no memory's gradient is negative. The share of projected
    steps is logged as `gem_projected_steps`. It needs a backward pass per memory and step, and 4 bytes per memory and
    trained parameter. `memories` has a dataset of `input_ids` and `labels` for each earlier task.
    """

    def __init__(self, *args: Any, memories: Sequence[Dataset], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memories = list(memories)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the parent's step. After the last micro-batch of an optimizer step, project the gradient."""
        loss = super().training_step(*args, **kwargs)
        if self.memories and self.accelerator.sync_gradients:
            self._metrics["train"]["gem_projected_steps"].append(float(self._project()))
        return loss

    def _project(self) -> bool:
        """Replace the gradient if its product with a memory's is negative. Return whether it was."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in parameters]
        parts = self._memory_gradients(parameters, sizes).split(sizes, dim=1)
        count = len(self.memories)
        gram, dots = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        for part, parameter in zip(parts, parameters, strict=True):
            gram += (part @ part.T).cpu()
            if parameter.grad is not None:
                dots += (part @ parameter.grad.flatten().float()).cpu()
        # All processes have the same gradients, but a difference in the last bit would make their models diverge
        gram, dots = broadcast_object_list([gram.numpy(), dots.numpy()])
        if not (np.isfinite(gram).all() and np.isfinite(dots).all()):
            raise HFTError(
                f"the gradient of the task or of a memory is NaN or infinite at step {self.state.global_step + 1}: "
                "lower the learning rate or check the data."
            )
        found = multipliers(gram, dots)
        if not found.any():
            return False
        factors = torch.tensor(found, dtype=torch.float32, device=parts[0].device)
        for part, parameter in zip(parts, parameters, strict=True):
            addition = (factors @ part).view_as(parameter).to(parameter.dtype)
            if parameter.grad is not None:
                parameter.grad += addition
            elif addition.any():
                parameter.grad = addition
        return True

    def _memory_gradients(self, parameters: Sequence[torch.nn.Parameter], sizes: Sequence[int]) -> torch.Tensor:
        """Compute the gradients of the memories' losses, of shape `(memories, parameters)`."""
        device = self.accelerator.device
        gradients = torch.zeros(len(self.memories), sum(sizes), device=device)
        # Dropout must not change what the next step draws
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for memory, gradient in zip(self.memories, gradients, strict=True):
                batches, tokens = self._memory_batches(memory)
                for batch in batches:
                    with self.accelerator.autocast():
                        # TRL's log-probabilities, which are 0 where there is no loss
                        log_probs = self.model(**batch, use_cache=False, fused_lm_head=True).log_probs
                    # `backward` would change `.grad` and run DDP's hooks
                    found = torch.autograd.grad(-log_probs.sum() / tokens, parameters, allow_unused=True)
                    for part, new in zip(gradient.split(sizes), found, strict=True):
                        if new is not None:
                            part += new.flatten()
                if self.accelerator.num_processes > 1:
                    torch.distributed.all_reduce(gradient)
        return gradients

    def _memory_batches(self, memory: Dataset) -> tuple[list[dict[str, torch.Tensor]], int]:
        """Return this process's micro-batches of a step, and all processes' number of tokens with a loss."""
        processes = self.accelerator.num_processes
        # The rows do not depend on how the global batch is divided, which may change when a run is resumed
        size = self._train_batch_size * processes * self.args.gradient_accumulation_steps
        start = self.state.global_step * size
        rows = [memory[number % len(memory)] for number in range(start, start + min(size, len(memory)))]
        tokens = sum(label != -100 for row in rows for label in row["labels"][1:])
        ours = rows[self.accelerator.process_index :: processes]
        parts = [ours[i : i + self._train_batch_size] for i in range(0, len(ours), self._train_batch_size)]
        return [self._prepare_inputs(self.data_collator(part)) for part in parts], max(1, tokens)


def multipliers(gram: np.ndarray, dots: np.ndarray) -> np.ndarray:
    """
    Solve GEM's dual quadratic program (equation 11) for the multiplier of each memory's gradient.

    With G the memories' gradients and g the current one, v minimizes v'(GG' + e)v / 2 + (Gg)'v with all v at least
    `MARGIN`. `gram` is GG', of shape `(memories, memories)`, `dots` is Gg, and the diagonal e is relative to that of
    GG'. If no entry of `dots` is negative, all multipliers are 0.
    """
    if (dots >= 0).all():
        return np.zeros_like(dots)
    import quadprog

    # Gradients are normalized, so that the solver treats short ones with the same precision
    lengths = np.sqrt(np.diag(gram))
    lengths[lengths == 0] = 1
    scale = np.abs(dots / lengths).max()
    matrix = gram / np.outer(lengths, lengths) + EPSILON * np.eye(len(dots))
    solution = quadprog.solve_qp(matrix, -dots / lengths / scale, np.eye(len(dots)), MARGIN * lengths / scale)[0]
    return np.maximum(solution * scale / lengths, MARGIN)  # rounding can cross the bound


def check_gem(args: SFTConfig, hft_config: HFTConfig | None = None) -> None:
    """Reject settings that GEM does not support, before a model is loaded."""
    sharded, smoothing = sharded_by(args), args.label_smoothing_factor
    freed = hft_config is not None and hft_config.optimizer_in_backward
    for rejected, reason in (
        (freed, "hft.optimizer_in_backward frees the gradients that gem compares: drop it"),
        (sharded, f"{sharded} shards gradients, which gem compares as a whole: use accelerate_configs/ddp.yaml"),
        (args.mixed_precision == "fp16", "fp16 scales gradients, which gem compares: use bf16, or no mixed precision"),
        (
            reentrant(args),
            "reentrant checkpointing does not give the gradients that gem needs: set use_reentrant to false",
        ),
        (
            args.loss_type != "nll" or smoothing,
            f"sft.loss_type is {args.loss_type!r} and sft.label_smoothing_factor {smoothing}: gem compares gradients "
            "of the plain loss, so set them to nll and 0",
        ),
    ):
        if rejected:
            raise HFTError(f"approach is gem, but {reason}. Or choose another approach.")
