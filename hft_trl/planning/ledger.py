"""Memory and operations of a step, counted for each operation that PyTorch dispatches."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import addmm_flop, flop_registry, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten

PARTS = ("gradients", "weight_copies", "logits", "activations")


class Ledger(TorchDispatchMode):
    """
    Count the bytes of live storages and the operations of matrix products, on fake or real tensors.

    Parameters and buffers of `models` and memory inside kernels do not count. A multiply-add is two `operations`.
    `at_peak` has the bytes by part: `weight_copies` are autocast's, `activations` the rest. The peak of everything but
    gradients, `at_peak_without_gradients`, can be at another time.
    """

    def __init__(self, *models: torch.nn.Module) -> None:
        super().__init__()
        self.operations = 0
        self.live = dict.fromkeys(PARTS, 0)
        self.at_peak, self.at_peak_without_gradients = dict(self.live), dict(self.live)
        self._part: str | None = None
        self._known: dict[int, tuple[weakref.ref, int, str]] = {}
        parameters = [parameter for model in models for parameter in model.parameters()]
        existing = [*parameters, *(buffer for model in models for buffer in model.buffers())]
        self._weights = {tensor.untyped_storage()._cdata for tensor in existing}
        self._hooks = [p.register_post_accumulate_grad_hook(self._is_gradient) for p in parameters if p.requires_grad]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        # Models read values of the padding mask, so operations on real tensors are computed
        real = tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        with unset_fake_temporarily() if real else nullcontext():
            out = _experts(func, *args) if func is aten._grouped_mm.default else func(*args, **(kwargs or {}))
        count = OPERATIONS.get(func._overloadpacket)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=out)
        part = self._part
        if part is None:
            copied = func is aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
            part = "weight_copies" if copied else "activations"
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._enter(tensor, part)
        return out

    def _enter(self, tensor: torch.Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._weights:
            return
        size = storage.nbytes()
        # The weak reference removes the entry before another storage can have the same address
        self._known[key] = (weakref.ref(storage, lambda _: self._leave(key)), size, part)
        self.live[part] += size
        now, other = dict(self.live), {**self.live, "gradients": 0}
        self.at_peak = max(self.at_peak, now, key=lambda parts: sum(parts.values()))
        before = self.at_peak_without_gradients
        self.at_peak_without_gradients = max(before, other, key=lambda parts: sum(parts.values()))

    def _leave(self, key: int) -> None:
        _, size, part = self._known.pop(key)
        self.live[part] -= size

    def _is_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is None:  # freed by an optimizer in the backward pass
            return
        key = parameter.grad.untyped_storage()._cdata
        if key in self._known:
            reference, size, part = self._known[key]
            self._known[key] = (reference, size, "gradients")
            self.live[part] -= size
            self.live["gradients"] += size


def _experts(func: Any, left: torch.Tensor, right: torch.Tensor, *others: Any) -> torch.Tensor:
    """Compute the grouped product of experts. Fake tensors support only bfloat16."""
    if not isinstance(left, FakeTensor) or left.dtype == torch.bfloat16:
        return func(left, right, *others)
    return func(left.bfloat16(), right.bfloat16(), *others).to(left.dtype)


def _attention(formula: Callable[..., int], tensors: int, place: int, *args: Any, **kwargs: Any) -> int:
    """Apply a formula to the first tensors. Causal kernels skip half of the scores."""
    causal = kwargs.get("is_causal", args[place] if len(args) > place else False)
    return formula(*args[:tensors]) // (2 if causal else 1)


def _grouped(left: torch.Tensor, right: torch.Tensor, *_: Any, **__: Any) -> int:
    """Return the operations of a product per group of rows (experts) or columns (weight gradients)."""
    return 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]


# PyTorch's formulas, and those of operations that it does not cover
OPERATIONS = {
    **flop_registry,
    aten.addmm_: addmm_flop,
    aten._grouped_mm: _grouped,
    aten._scaled_dot_product_flash_attention_for_cpu: partial(_attention, sdpa_flop, 3, 4),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: partial(_attention, sdpa_backward_flop, 4, 7),
}
