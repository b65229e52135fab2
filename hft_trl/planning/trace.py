"""
A training step traced on fake tensors: forward, backward and the reference's forward.

The model's own code runs, so architectures need no table. PyTorch decides what is saved and recomputed. TRL 1.16's
output head makes tiles of 4,096 tokens by 32,768 words instead of full logits. Its Triton kernels for GPUs do not run
on fake tensors, so a function that allocates the same tensors replaces them.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import disable_dropout_in_model

from hft_trl.errors import HFTError, first_line
from hft_trl.frozen.quantized_linear import QuantizedLinear, frozen_matrices
from hft_trl.frozen.smaller_type import kept_in_their_type
from hft_trl.planning.ledger import Ledger
from hft_trl.selection import Selection

VOCABULARY_CHUNK = 32_768  # TRL's tile width, also for smaller vocabularies
OUTPUTS = {"sft": ("log_probs", "entropy", "is_top1"), "dpo": ("log_probs", "entropy", "mean_logits", "is_top1")}


@dataclass(frozen=True)
class StepSettings:
    stage: Literal["sft", "dpo"]
    micro_batch: int  # rows, or pairs, per GPU
    length: int  # tokens per row
    dtype: torch.dtype = torch.float32
    frozen_dtype: torch.dtype | None = None
    autocast: bool = True  # to bfloat16
    checkpointed: int = 0  # every n-th layer: 0 is none, 1 is all
    device: Literal["cuda", "cpu"] = "cuda"  # where the output head runs
    frozen_quantization: str | None = None
    optimizer_in_backward: bool = False


@dataclass(frozen=True)
class Step:
    """Operations of a step, and its memory in bytes besides weights and optimizer state."""

    saved: int  # for the backward pass, without parameters
    at_peak: dict[str, int]  # by part, see `Ledger`
    at_peak_without_gradients: dict[str, int]
    operations: int


def trace_step(skeleton: PreTrainedModel, selection: Selection, settings: StepSettings) -> Step:
    """Trace a step of a model on the meta device, which stays unchanged."""
    model = copy.deepcopy(skeleton)
    selection.apply(model)
    reference = copy.deepcopy(model) if settings.stage == "dpo" else None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            _prepare(model, reference, settings)
            return _trace(model, reference, settings)
    except Exception as error:  # any error of the model's code
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise HFTError(f"a step of {type(model).__name__} cannot be traced without weights: {reason}") from error


def _prepare(model: PreTrainedModel, reference: PreTrainedModel | None, settings: StepSettings) -> None:
    _allocate(model, settings)
    if settings.frozen_quantization:
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        for name, linear in frozen_matrices(model, frozen).items():
            if linear is not None:
                model.set_submodule(name.rpartition(".")[0], QuantizedLinear(linear, settings.frozen_quantization))
    model.train()
    if settings.checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=settings.checkpointed)
    if reference is not None:
        disable_dropout_in_model(model)  # TRL's default
        _allocate(reference, settings)
        reference.requires_grad_(False).eval()


def _allocate(model: PreTrainedModel, settings: StepSettings) -> None:
    """Replace a model's meta tensors with fake CPU tensors. Tied parameters stay tied."""
    kept = kept_in_their_type(model)
    with unset_fake_temporarily():
        for parameter in model.parameters():
            rounded = settings.frozen_dtype and not parameter.requires_grad and id(parameter) not in kept
            parameter.data = parameter.data.to(settings.frozen_dtype if rounded else settings.dtype)
    model.to_empty(device="cpu")
    model.tie_weights()


def _trace(model: PreTrainedModel, reference: PreTrainedModel | None, settings: StepSettings) -> Step:
    rows = settings.micro_batch * (2 if settings.stage == "dpo" else 1)
    tokens = torch.zeros(rows, settings.length, dtype=torch.long)
    with unset_fake_temporarily():  # models read whether the mask masks anything
        mask = torch.ones(rows, settings.length, dtype=torch.long)
        mask[-1, -1] = 0 if rows > 1 else 1  # a single row has no padding
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    # Weak references, so that no later storage gets the address of one that is freed before the backward pass
    saved: dict[int, tuple[StorageWeakRef, int]] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return tensor

    with Ledger(model, *([] if reference is None else [reference])) as ledger:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            scores, balance = _forward(model, tokens, mask, settings, ledger)
        if reference is not None:
            with torch.no_grad():
                reference_scores, _ = _forward(reference, tokens, mask, settings, ledger)
            ratios = (scores - reference_scores).sum(dim=1)
            chosen, rejected = ratios.chunk(2)
            loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
        else:
            loss = -scores.sum() / scores.numel()
        loss = loss + balance
        saved_bytes = sum(size for storage, size in saved.values() if not storage.expired())
        del scores
        if settings.optimizer_in_backward:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_free)
        loss.backward()
    return Step(saved_bytes, ledger.at_peak, ledger.at_peak_without_gradients, ledger.operations)


def _forward(
    model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor, settings: StepSettings, ledger: Ledger
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Return log-probabilities of next tokens, and TRL's load balancing loss for a mixture of experts."""
    config = model.config.get_text_config()
    named = config.to_dict()
    balances = model.training and bool(named.get("router_aux_loss_coef")) and "output_router_logits" in named
    # accelerate runs each forward pass, of policy and reference, under its own autocast
    with torch.autocast("cpu", torch.bfloat16) if settings.autocast else nullcontext():
        router = {"output_router_logits": True} if balances else {}
        outputs = model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False, **router)
        head, hidden = model.get_output_embeddings(), outputs.last_hidden_state[:, :-1]
        inputs = (hidden.reshape(-1, hidden.size(-1)), head.weight, head.bias, tokens[:, 1:].reshape(-1))
        if settings.device == "cpu":  # memory of its backward pass counts as activations
            with ledger.part("logits"):
                more = (1.0, VOCABULARY_CHUNK, named.get("final_logit_softcapping"), 1.0, OUTPUTS[settings.stage])
                scores, *_ = ChunkedLogProbFunction.apply(*inputs, *more)
        else:
            scores = _OnGPU.apply(*inputs, ledger)
        scores = scores.view(len(tokens), -1)
        if not balances:
            return scores, 0.0
        experts, chosen = config.num_experts, config.num_experts_per_tok
        return scores, load_balancing_loss_func(outputs.router_logits, experts, chosen, mask)


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


def _free(parameter: torch.Tensor) -> None:
    parameter.grad = None
