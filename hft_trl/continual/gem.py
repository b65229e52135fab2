"""Gradient Episodic Memory (GEM): no step may raise the loss on what is kept of an earlier task."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from trl import SFTConfig

from hft_trl.backends.fsdp import fsdp_version
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.trainers import HFTSFTTrainer

MARGIN = 0.5
"""Least multiplier of a memory's gradient in a projected step (TRACE's and the GEM authors' value)."""

EPSILON = 1e-4
"""What is added to the squared length of each memory's gradient, relative to it: the programme needs a definite matrix."""


class GEMTrainer(HFTSFTTrainer):
    """
    [`HFTSFTTrainer`] with Gradient Episodic Memory (Lopez-Paz & Ranzato 2017, https://huggingface.co/papers/1706.08840).

    Before clipping, each optimizer step's gradient is compared with those of the mean token loss on a batch of every
    memory, over the trained parameters only. Where one of them points against it, it is replaced by the nearest gradient
    that none does (nearest but for the margin). A step takes the next rows of each memory, as many as a global batch has,
    counted by `global_step`, so nothing depends on a random state. How often a step's gradient was replaced is logged as
    `gem_projected_steps`, a share.

    For one process and DDP. Takes a backward pass per memory and step, and 4 bytes per memory and trained parameter.

    Args:
        memories (`Sequence[Dataset]`):
            Rows of `input_ids` and `labels`, a data set for each earlier task.
        margin (`float`, *optional*, defaults to `0.5`):
            Least multiplier of each memory's gradient in a replaced one.

    Raises:
        [`HFTError`]: As [`check_gem`] does, and during training if a gradient is NaN or infinite.
    """

    def __init__(self, *args: Any, memories: Sequence[Dataset], margin: float = MARGIN, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_gem(self.args, self.hft_config)
        self.memories, self.margin = list(memories), margin

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the parent's step; after the last micro-batch of an optimizer step, project its gradient."""
        loss = super().training_step(*args, **kwargs)
        if self.memories and self.accelerator.sync_gradients:
            self._metrics["train"]["gem_projected_steps"].append(float(self._project()))
        return loss

    def _project(self) -> bool:
        """Replace the gradient where a memory's points against it; tell whether one did."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in parameters]
        parts = self._memory_gradients(parameters, sizes).split(sizes, dim=1)
        count = len(self.memories)
        gram, dots = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        for part, parameter in zip(parts, parameters, strict=True):
            gram += (part @ part.T).cpu()
            if parameter.grad is not None:
                dots += (part @ parameter.grad.flatten().float()).cpu()
        # Every process has the same gradients already; a last bit that differed would part their models for good.
        gram, dots = broadcast_object_list([gram.numpy(), dots.numpy()])
        if not (np.isfinite(gram).all() and np.isfinite(dots).all()):
            raise HFTError(
                f"the gradient of the task or of a memory is NaN or infinite at step {self.state.global_step + 1}: lower the "
                "learning rate or check the data."
            )
        found = multipliers(gram, dots, self.margin)
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
        """Gradients of the memories' losses, of shape `(memories, trained numbers)`; `.grad` is left as it is."""
        device = self.accelerator.device
        gradients = torch.zeros(len(self.memories), sum(sizes), device=device)
        # Dropout, if there is any, must not change what the next step draws.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for memory, gradient in zip(self.memories, gradients, strict=True):
                batches, tokens = self._memory_batches(memory)
                for batch in batches:
                    with self.accelerator.autocast():
                        # TRL's; 0 where no loss is
                        log_probs = self.model(**batch, use_cache=False, fused_lm_head=True).log_probs
                    # Without `backward`, neither `.grad` nor DDP's hooks take part
                    found = torch.autograd.grad(-log_probs.sum() / tokens, parameters, allow_unused=True)
                    for part, new in zip(gradient.split(sizes), found, strict=True):
                        if new is not None:
                            part += new.flatten()
                if self.accelerator.num_processes > 1:
                    torch.distributed.all_reduce(gradient)
        return gradients

    def _memory_batches(self, memory: Dataset) -> tuple[list[dict[str, torch.Tensor]], int]:
        """This process's part of the step's rows in micro-batches, and the tokens with a loss in the rows of all processes."""
        processes = self.accelerator.num_processes
        # However the global batch is divided, which may change when a run goes on, the rows are the same.
        size = self._train_batch_size * processes * self.args.gradient_accumulation_steps
        start = self.state.global_step * size
        rows = [memory[number % len(memory)] for number in range(start, start + min(size, len(memory)))]
        tokens = sum(label != -100 for row in rows for label in row["labels"][1:])
        ours = rows[self.accelerator.process_index :: processes]
        parts = [ours[i : i + self._train_batch_size] for i in range(0, len(ours), self._train_batch_size)]
        return [self._prepare_inputs(self.data_collator(part)) for part in parts], max(1, tokens)


def multipliers(gram: np.ndarray, dots: np.ndarray, margin: float = MARGIN) -> np.ndarray:
    """
    Solve GEM's dual quadratic programme (equation 11): how much of each memory's gradient is added to the current one.

    With G the memories' gradients and g the current one, it is the v that minimises v'(GG' + e)v / 2 + (Gg)'v where no v is
    below the margin. The diagonal e is relative to that of GG', so a loss in other units gives the same v.

    Args:
        gram (`np.ndarray`):
            GG', of shape `(memories, memories)`.
        dots (`np.ndarray`):
            Gg, of shape `(memories,)`.
        margin (`float`, *optional*, defaults to `0.5`):
            Least multiplier.

    Returns:
        `np.ndarray`: The multipliers, all 0 where no memory's gradient points against the current one.
    """
    if (dots >= 0).all():
        return np.zeros_like(dots)
    import quadprog

    # In units of each gradient's length, so that a task whose gradient is short counts as the others do
    lengths = np.sqrt(np.diag(gram))
    lengths[lengths == 0] = 1
    scale = np.abs(dots / lengths).max()
    matrix = gram / np.outer(lengths, lengths) + EPSILON * np.eye(len(dots))
    solution = quadprog.solve_qp(matrix, -dots / lengths / scale, np.eye(len(dots)), margin * lengths / scale)[0]
    return np.maximum(solution * scale / lengths, margin)  # the bound itself, but for rounding


def check_gem(args: SFTConfig, hft_config: HFTConfig | None = None) -> None:
    """
    Refuse what GEM can't be right under, before a model is loaded.

    Args:
        args ([`~trl.SFTConfig`]):
            The trainer's arguments.
        hft_config ([`HFTConfig`], *optional*):
            The settings of HFT.

    Raises:
        [`HFTError`]: Naming the setting and what to use instead, or the library to install.
    """
    if hft_config is not None and hft_config.optimizer_in_backward:
        raise HFTError(
            "approach is gem, but hft.optimizer_in_backward frees the gradients that gem compares: leave it out, or choose "
            "another approach."
        )
    sharding = "DeepSpeed" if args.deepspeed_plugin is not None else "FSDP" if fsdp_version(args) is not None else None
    if sharding is not None:
        raise HFTError(
            f"approach is gem, but {sharding} shards gradients, which gem compares as a whole: launch one process or DDP "
            "(accelerate_configs/ddp.yaml), or choose another approach."
        )
    if args.mixed_precision == "fp16":
        raise HFTError(
            "approach is gem, but fp16 scales gradients, which gem compares with others: use bf16, or none."
        )
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise HFTError(
            "approach is gem, but reentrant checkpointing gives no gradients beside a step's own: set use_reentrant to false."
        )
    if args.loss_type != "nll" or args.label_smoothing_factor:
        raise HFTError(
            f"approach is gem, but sft.loss_type is {args.loss_type!r} and sft.label_smoothing_factor "
            f"{args.label_smoothing_factor}: gem compares gradients of the plain loss, so keep nll and 0."
        )
    try:
        import quadprog  # noqa: F401
    except ImportError as error:
        raise HFTError(
            "the approach gem needs quadprog: run pip install -c constraints.txt -e '.[continual]'."
        ) from error
