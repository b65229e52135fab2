"""
A training step traced on fake tensors: forward, backward and the reference's forward.

The model's own code runs, so architectures need no table. PyTorch decides what is saved and recomputed.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import disable_dropout_in_model

from hft_trl.errors import HFTError, first_line
from hft_trl.frozen.quantized_linear import QuantizedLinear, frozen_matrices
from hft_trl.planning.head import log_probs
from hft_trl.planning.ledger import Ledger
from hft_trl.selection import Selection


@dataclass(frozen=True)
class StepSettings:
    """Settings of a traced step."""

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
    """
    Trace a step of a model on the meta device, which stays unchanged.

    Code that needs values of tensors or does not match its config raises an [`HFTError`].
    """
    model = copy.deepcopy(skeleton)
    selection.apply(model)
    reference = copy.deepcopy(model) if settings.stage == "dpo" else None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            _prepare(model, reference, settings)
            return _trace(model, reference, settings)
    except Exception as error:  # any error of the model's code
        raise HFTError(
            f"a step of {type(model).__name__} cannot be traced without weights, so its memory cannot be planned: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _prepare(model: PreTrainedModel, reference: PreTrainedModel | None, settings: StepSettings) -> None:
    """Give both models fake weights, and configure them as the trainers do."""
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
    with unset_fake_temporarily():
        for parameter in model.parameters():
            dtype = settings.dtype if parameter.requires_grad else settings.frozen_dtype or settings.dtype
            parameter.data = parameter.data.to(dtype)
    model.to_empty(device="cpu")
    model.tie_weights()


def _trace(model: PreTrainedModel, reference: PreTrainedModel | None, settings: StepSettings) -> Step:
    rows = settings.micro_batch * (2 if settings.stage == "dpo" else 1)
    tokens = torch.zeros(rows, settings.length, dtype=torch.long)
    with unset_fake_temporarily():  # models read whether the mask masks anything
        mask = torch.ones(rows, settings.length, dtype=torch.long)
        mask[-1, -1] = 0 if rows > 1 else 1  # a single row has no padding
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
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
        saved_bytes = sum(saved.values())
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
    """Return log-probabilities, and TRL's load balancing loss for a mixture of experts."""
    config = model.config.get_text_config()
    named = config.to_dict()
    balances = model.training and bool(named.get("router_aux_loss_coef")) and "output_router_logits" in named
    # accelerate runs each forward pass, of policy and reference, under its own autocast
    with torch.autocast("cpu", torch.bfloat16) if settings.autocast else nullcontext():
        router = {"output_router_logits": True} if balances else {}
        outputs = model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False, **router)
        scores = log_probs(model, outputs.last_hidden_state, tokens, settings.stage, settings.device, ledger)
        if not balances:
            return scores, 0.0
        experts, chosen = config.num_experts, config.num_experts_per_tok
        return scores, load_balancing_loss_func(outputs.router_logits, experts, chosen, mask)


def _free(parameter: torch.Tensor) -> None:
    parameter.grad = None
