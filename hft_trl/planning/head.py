"""
The output head of TRL 1.16: tiles of 4,096 tokens by 32,768 words instead of full logits.

On a CPU, TRL's function runs. Its Triton kernels for GPUs do not run on fake tensors, so a function that allocates
the same tensors replaces them.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from hft_trl.planning.ledger import Ledger

VOCABULARY_CHUNK = 32_768  # TRL's tile width, also for smaller vocabularies
OUTPUTS = {"sft": ("log_probs", "entropy", "is_top1"), "dpo": ("log_probs", "entropy", "mean_logits", "is_top1")}


def log_probs(
    model: PreTrainedModel, hidden: torch.Tensor, labels: torch.Tensor, stage: str, device: str, ledger: Ledger
) -> torch.Tensor:
    """
    Return log-probabilities of next tokens, `(rows, length - 1)`, and count allocations as logits.

    `hidden` is the last layer's output, `(rows, length, hidden size)`, `labels` are the tokens, `(rows, length)`.
    """
    head = model.get_output_embeddings()
    targets = labels[:, 1:]
    rows = hidden[:, :-1].reshape(-1, hidden.size(-1))
    inputs = (rows, head.weight, head.bias, targets.reshape(-1))
    if device == "cpu":  # memory of its backward pass counts as activations
        with ledger.part("logits"):
            scores, *_ = ChunkedLogProbFunction.apply(*inputs, 1.0, VOCABULARY_CHUNK, None, 1.0, OUTPUTS[stage])
    else:
        scores = _OnGPU.apply(*inputs, ledger)
    return scores.view(targets.shape)


class _OnGPU(torch.autograd.Function):
    """The allocations of TRL's function on a GPU, and the operations of its products."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        hidden, weight, bias, targets, ledger = args
        ctx.ledger = ledger
        ctx.kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        with ledger.part("logits"):
            _tile(hidden, weight, ctx.kind)
            statistics = torch.empty(9, hidden.size(0))
            log_z, scores = statistics[0].clone(), statistics[1].clone()
        ledger.operations += 2 * hidden.numel() * weight.size(0)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, log_z.clone())
        return scores

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, needed = ctx.saved_tensors[:3], ctx.needs_input_grad[:3]
        hidden, weight, _ = inputs
        with ctx.ledger.part("logits"):
            sums = [  # always float32
                torch.zeros(tensor.shape, dtype=torch.float32) if needs else None
                for tensor, needs in zip(inputs, needed, strict=True)
            ]
            _tile(hidden, weight, ctx.kind)
            ctx.ledger.operations += 2 * hidden.numel() * weight.size(0) * (1 + needed[0] + needed[1])
            grads = [None if sum_ is None else sum_.to(like.dtype) for sum_, like in zip(sums, inputs, strict=True)]
        return (*grads, None, None)


def _tile(hidden: torch.Tensor, weight: torch.Tensor, kind: torch.dtype) -> None:
    """Allocate a tile of logits, and casts of the tokens and head weights for it."""
    tokens = min(hidden.size(0), TOKEN_CHUNK_SIZE)
    buffers = [torch.empty(tokens, VOCABULARY_CHUNK, dtype=kind)]
    buffers.append(hidden[:tokens].to(kind))
    buffers.append(weight[:VOCABULARY_CHUNK].to(kind))
