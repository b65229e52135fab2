"""How important each unit is: numbers from which strategy "importance" chooses."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from transformers import PreTrainedModel

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.selection.units import Unit
from hft_trl.weights import full, named_parameters

Squares = Mapping[str, float]
"""Sum over the elements of a parameter of the squares of what is measured, by the parameter's name."""


def unit_scores(
    model: PreTrainedModel,
    units: Iterable[Unit],
    config: HFTConfig,
    gradients: Callable[[list[str]], Squares] | None = None,
) -> dict[Unit, float]:
    """
    Score the units in layers; those with the highest scores are to learn.

    The importance of a unit is the root mean square over its elements, so that units of different sizes compare. It is
    negated where the least important units are to learn. Under ZeRO-3 every process has to call.
    """
    inner = [unit for unit in units if unit.layer is not None]
    names = [name for unit in inner for name in unit.names]
    if config.importance == "weight_norm":
        squares = _weight_squares(dict(named_parameters(model)), names)
    elif gradients is not None:
        squares = gradients(names)
    else:
        raise HFTError(
            "hft.importance is 'gradient_norm', which needs a trainer with its data and loss: draw the selection in "
            "training, or set hft.importance to weight_norm."
        )
    for name in names:
        if not math.isfinite(squares[name]):
            raise HFTError(
                f"hft.importance is {config.importance!r}, but that of {name} is NaN or infinite: check the model's "
                f"weights{' and the data' if config.by_gradient else ''}."
            )
    sign = 1 if config.importance_order == "most" else -1
    return {unit: sign * math.sqrt(sum(squares[name] for name in unit.names) / unit.size) for unit in inner}


def _weight_squares(parameters: Mapping[str, torch.Tensor], names: Iterable[str]) -> Squares:
    if any(parameters[name].is_meta for name in names):
        raise HFTError(
            "hft.importance is 'weight_norm', but only the model's shapes are here: load the model with its weights, "
            "or use another hft.strategy."
        )
    return {name: torch.linalg.vector_norm(full(parameters[name]), dtype=torch.float64).item() ** 2 for name in names}
