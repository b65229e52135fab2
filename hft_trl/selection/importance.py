"""Score the importance of each unit for strategy "importance"."""

import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean

import torch
from transformers import PreTrainedModel

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.selection.units import Unit
from hft_trl.weights import full, named_parameters

Squares = Mapping[str, float]
"""Sum over a parameter's elements of the squares of what is measured, by parameter name."""

Calibrate = Callable[[list[str]], Squares]
"""Measures the parameters of these names on data."""


def unit_scores(
    model: PreTrainedModel, units: Iterable[Unit], config: HFTConfig, calibrate: Calibrate | None = None
) -> dict[Unit, float]:
    """
    Score the units in layers; those with the highest scores are to learn.

    The importance of a unit is the root mean square over its elements, so that units of different sizes compare, or
    the rank of its signal-to-noise ratio. Under ZeRO-3 every process has to call.
    """
    inner = [unit for unit in units if unit.layer is not None]
    found = _measure(model, [name for unit in inner for name in unit.names], config, calibrate)
    scores = {unit: math.sqrt(sum(found[name] for name in unit.names) / unit.size) for unit in inner}
    if config.importance in ("wanda", "snr"):  # whose scale says more about the slot than about the unit
        scores = _ranks(scores)
    sign = 1 if config.importance_order == "most" else -1
    return {unit: sign * score for unit, score in scores.items()}


def _measure(model: PreTrainedModel, names: list[str], config: HFTConfig, calibrate: Calibrate | None) -> Squares:
    """Measure the importance of the parameters. Reject NaN, and infinity except for `snr`."""
    if config.calibrated and calibrate is None:
        raise HFTError(
            f"hft.importance is {config.importance!r}, which needs a trainer with its data and loss: draw the "
            "selection in training, or set hft.importance to weight_norm or snr."
        )
    parameters = dict(named_parameters(model))
    if not config.calibrated and any(parameters[name].is_meta for name in names):
        raise HFTError(
            f"hft.importance is {config.importance!r}, but only the model's shapes are here: load the model with its "
            "weights, or use another hft.strategy."
        )
    if config.calibrated:
        found = calibrate(names)
    else:
        measure = _signal_to_noise if config.importance == "snr" else _square
        found = {name: measure(full(parameters[name])) for name in names}
    for name in names:
        infinite = math.isinf(found[name]) and config.importance != "snr"  # there a matrix without noise
        if math.isnan(found[name]) or infinite:
            raise HFTError(
                f"hft.importance is {config.importance!r}, but that of {name} is NaN or infinite: check the model's "
                f"weights{' and the data' if config.calibrated else ''}."
            )
    return found


def _square(weight: torch.Tensor) -> float:
    return torch.linalg.vector_norm(weight, dtype=torch.float64).item() ** 2


def _signal_to_noise(weight: torch.Tensor) -> float:
    """
    Return a matrix's signal-to-noise ratio, divided by the largest singular value.

    As Spectrum (arXiv 2406.06623): the Marchenko-Pastur law bounds the noise, whose deviation is estimated by the
    quartiles. 0 for what is no matrix. Of fused experts the mean. Infinite without noise, and NaN if a weight is not
    finite.
    """
    if weight.dim() < 2:
        return 0.0
    if not weight.isfinite().all():  # has no singular values
        return math.nan
    ratios = []
    for matrix in weight.reshape(-1, *weight.shape[-2:]):
        values = torch.linalg.svdvals(matrix.float())
        low, high = torch.quantile(values, torch.tensor([0.25, 0.75], device=values.device)).tolist()
        bound = (high - low) / 1.349 * (1 + math.sqrt(min(matrix.shape) / max(matrix.shape)))
        noise = values[values <= bound].sum().item()
        signal = values.sum().item() - noise
        ratios.append(signal / noise / values[0].item() if noise else math.inf if signal else 0.0)
    return fmean(ratios)


def _ranks(scores: Mapping[Unit, float]) -> dict[Unit, float]:
    """Return the share of the units of the same slot that have a lower score."""
    alike: dict[tuple[str, int], list[float]] = defaultdict(list)
    for unit, score in scores.items():
        insort(alike[unit.slot, unit.size], score)
    groups = {unit: alike[unit.slot, unit.size] for unit in scores}
    return {unit: bisect_left(group, scores[unit]) / len(group) for unit, group in groups.items()}
