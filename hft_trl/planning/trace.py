"""
A training step without weights: forward, backward and the reference's forward on fake tensors, with every byte accounted for.

The model's own code is run, so nothing here knows an architecture; what autograd keeps, what a frozen matrix leaves out and
what activation checkpointing computes again is what PyTorch itself decides.
"""

import copy
from collections.abc import Callable
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
    """
    What a step is traced with.

    Args:
        stage (`str`): `"sft"` or `"dpo"`, in which a row of the micro-batch is a pair, and a reference is asked too.
        micro_batch (`int`): Rows (pairs) on one GPU at once.
        length (`int`): Tokens of a row.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Type of the weights.
        frozen_dtype (`torch.dtype`, *optional*): Type of the frozen ones, by default the same.
        autocast (`bool`, *optional*, defaults to `True`): Whether products are computed in bfloat16 under autocast.
        checkpointed (`int`, *optional*, defaults to `0`): Every which layer is checkpointed: 0 for none, 1 for all.
        device (`str`, *optional*, defaults to `"cuda"`): `"cuda"` or `"cpu"`, for the tiles of the output head.
        frozen_quantization (`str`, *optional*): `"int8"` or `"nf4"` for the frozen half's matrices.
        optimizer_in_backward (`bool`, *optional*, defaults to `False`): Whether each gradient is freed as soon as it is there.
    """

    stage: Literal["sft", "dpo"]
    micro_batch: int
    length: int
    dtype: torch.dtype = torch.float32
    frozen_dtype: torch.dtype | None = None
    autocast: bool = True
    checkpointed: int = 0
    device: Literal["cuda", "cpu"] = "cuda"
    frozen_quantization: str | None = None
    optimizer_in_backward: bool = False

    @property
    def rows(self) -> int:
        """Rows that go through the model at once: a pair is two."""
        return self.micro_batch * (2 if self.stage == "dpo" else 1)

    @property
    def padded(self) -> bool:
        """Whether rows of several lengths meet, so that attention gets a mask. A single row is never padded."""
        return self.rows > 1


@dataclass(frozen=True)
class Step:
    """
    What a step makes beside weights and optimizer state, in bytes.

    Args:
        saved (`int`): What the forward pass keeps for the backward pass, parameters left out, each storage once.
        peak (`int`): Most at once, gradients among it, where there were none before.
        at_peak (`dict[str, int]`): Its parts: gradients, weight_copies, logits, activations.
        peak_without_gradients (`int`): Most at once of all else.
        at_peak_without_gradients (`dict[str, int]`): Its parts.
        gradients (`int`): All gradients.
        operations (`int`): Floating-point operations of matrix products and attention.
    """

    saved: int
    peak: int
    at_peak: dict[str, int]
    peak_without_gradients: int
    at_peak_without_gradients: dict[str, int]
    gradients: int
    operations: int


def trace_step(skeleton: PreTrainedModel, selection: Selection, settings: StepSettings) -> Step:
    """
    Trace one step.

    Args:
        skeleton ([`~transformers.PreTrainedModel`]):
            The model on the meta device. It stays as it is.
        selection ([`Selection`]):
            What learns.
        settings ([`StepSettings`]):
            The rest.

    Raises:
        [`HFTError`]: If the model's code can't be run without numbers, or does not fit its own config.
    """
    model = copy.deepcopy(skeleton)
    selection.apply(model)
    reference = copy.deepcopy(model) if settings.stage == "dpo" else None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _trace(model, reference, settings)
    except Exception as error:  # whatever the model's own code meets
        raise HFTError(
            f"a step of {type(model).__name__} can't be traced without numbers, so its memory can't be planned: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _trace(model: PreTrainedModel, reference: PreTrainedModel | None, settings: StepSettings) -> Step:
    _fill(model, settings)
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
        _fill(reference, settings)
        reference.requires_grad_(False).eval()
    tokens = torch.zeros(settings.rows, settings.length, dtype=torch.long)
    with unset_fake_temporarily():  # models look whether it masks anything
        mask = torch.ones(settings.rows, settings.length, dtype=torch.long)
        mask[-1, -1] = 0 if settings.padded else 1
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with Ledger(model, *([] if reference is None else [reference])) as ledger:
        with torch.autograd.graph.saved_tensors_hooks(keep, _as_it_is):
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
        saved = sum(kept.values())
        del scores
        if settings.optimizer_in_backward:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_free)
        loss.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return Step(
        saved,
        ledger.peak,
        ledger.at_peak,
        ledger.peak_without_gradients,
        ledger.at_peak_without_gradients,
        gradients,
        ledger.operations,
    )


def _forward(
    model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor, settings: StepSettings, ledger: Ledger
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """The log-probabilities, and the loss that balances a mixture's experts, which TRL adds where a model has one."""
    config = model.config.get_text_config()
    named = config.to_dict()
    balances = model.training and "output_router_logits" in named and bool(named.get("router_aux_loss_coef"))
    # accelerate puts every forward of either model under an autocast of its own
    with torch.autocast("cpu", torch.bfloat16) if settings.autocast else nullcontext():
        router = {"output_router_logits": True} if balances else {}
        outputs = model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False, **router)
        scores = log_probs(model, outputs.last_hidden_state, tokens, settings.stage, settings.device, ledger)
        if not balances:
            return scores, 0.0
        experts, chosen = config.num_experts, config.num_experts_per_tok
        return scores, load_balancing_loss_func(outputs.router_logits, experts, chosen, mask)


def _fill(model: PreTrainedModel, settings: StepSettings) -> None:
    """Give every parameter and buffer of a model on the meta device a fake storage, tied ones the same."""
    filled: dict[int, torch.nn.Parameter] = {}

    def parameter(old: torch.nn.Parameter) -> torch.nn.Parameter:
        dtype = settings.dtype if old.requires_grad else settings.frozen_dtype or settings.dtype
        return torch.nn.Parameter(torch.empty(old.shape, dtype=dtype), requires_grad=old.requires_grad)

    for module in model.modules():
        _replace(module._parameters, lambda old: filled.setdefault(id(old), parameter(old)))
        _replace(module._buffers, lambda old: torch.empty(old.shape, dtype=old.dtype))


def _replace(slots: dict[str, torch.Tensor | None], new: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for name, old in slots.items():
        if old is not None:
            slots[name] = new(old)


def _free(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
