"""
The output head as TRL 1.16 trains it: in tiles of 4,096 tokens by 32,768 words, so that the logits are never there as a whole.

On a CPU TRL's own function is run. On a GPU its Triton kernels work inside of the tile, which can't be run without one: a
function of the same tensors stands for it.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from hft_trl.planning.ledger import Ledger

VOCABULARY_CHUNK = 32_768  # TRL's own, for every vocabulary: a tile is that wide for smaller ones too
OUTPUTS = {"sft": ("log_probs", "entropy", "is_top1"), "dpo": ("log_probs", "entropy", "mean_logits", "is_top1")}


def log_probs(
    model: PreTrainedModel, hidden: torch.Tensor, labels: torch.Tensor, stage: str, device: str, ledger: Ledger
) -> torch.Tensor:
    """
    Log-probability of every next token.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, for its head.
        hidden (`torch.Tensor` of shape `(rows, length, hidden size)`):
            What its last layer gives.
        labels (`torch.Tensor` of shape `(rows, length)`):
            The tokens, all of which count: the most that a batch can have.
        stage (`str`):
            `"sft"` or `"dpo"`, which ask TRL for other figures beside.
        device (`str`):
            `"cuda"` or `"cpu"`: how the tiles are worked on.
        ledger ([`Ledger`]):
            Where the bytes are put down as logits.

    Returns:
        `torch.Tensor` of shape `(rows, length - 1)`.
    """
    head = model.get_output_embeddings()
    targets = labels[:, 1:]
    rows = hidden[:, :-1].reshape(-1, hidden.size(-1))
    given = (rows, head.weight, head.bias, targets.reshape(-1))
    if device == "cpu":
        scores, *_ = _OnCPU.apply(ledger, *given, 1.0, VOCABULARY_CHUNK, None, 1.0, OUTPUTS[stage])
    else:
        scores = _OnGPU.apply(ledger, *given)
    return scores.view(targets.shape)


class _OnCPU(torch.autograd.Function):
    """TRL's function, with its bytes put down as logits."""

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, *args: Any) -> tuple[torch.Tensor | None, ...]:
        ctx.ledger = ledger
        with ledger.part("logits"):
            return ChunkedLogProbFunction.forward(ctx, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        inner = _Shifted(ctx)
        with ctx.ledger.part("logits"):
            return (None, *ChunkedLogProbFunction.backward(inner, *grads))


class _Shifted:
    """What TRL's function kept, without the ledger that stands before its inputs."""

    def __init__(self, ctx: Any) -> None:
        self.saved_tensors, self.needs_input_grad = ctx.saved_tensors, ctx.needs_input_grad[1:]
        self.compute_dtype, self.chunk_size, self.kernel_args = ctx.compute_dtype, ctx.chunk_size, ctx.kernel_args


class _OnGPU(torch.autograd.Function):
    """The tensors that TRL's function makes on a GPU, and its products as a number."""

    @staticmethod
    def forward(
        ctx: Any,
        ledger: Ledger,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        ctx.ledger, ctx.kind = ledger, kind
        with ledger.part("logits"):
            _tile(hidden, weight, kind)
            statistics = torch.empty(9, hidden.size(0))
            log_z, scores = statistics[0].clone(), statistics[1].clone()
        ledger.operations += 2 * hidden.numel() * weight.size(0)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, log_z.clone())
        return scores

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, *_ = ctx.saved_tensors
        _, of_hidden, of_weight, of_bias, _ = ctx.needs_input_grad
        with ctx.ledger.part("logits"):  # sums are always float32
            grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32) if of_hidden else None
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32) if of_weight else None
            grad_bias = torch.zeros(bias.shape, dtype=torch.float32) if of_bias else None
            _tile(hidden, weight, ctx.kind)
            ctx.ledger.operations += 2 * hidden.numel() * weight.size(0) * (1 + of_hidden + of_weight)
            pairs = ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))
            return (None, *(grad if grad is None else grad.to(like.dtype) for grad, like in pairs), None)


def _tile(hidden: torch.Tensor, weight: torch.Tensor, kind: torch.dtype) -> None:
    """A tile of logits and, where they are held in another type, the part of the tokens and of the head that it is made of."""
    tokens = min(hidden.size(0), TOKEN_CHUNK_SIZE)
    buffers = [torch.empty(tokens, VOCABULARY_CHUNK, dtype=kind)]
    buffers.append(hidden[:tokens].to(kind))
    buffers.append(weight[:VOCABULARY_CHUNK].to(kind))
