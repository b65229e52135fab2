"""Strategy "importance": shares of strategy "category", and of each size the units that score highest."""

from collections import defaultdict

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from test_choose import RATIOS, SEEDS, groups_of, make_units

from hft_trl import HFTConfig, HFTError, select
from hft_trl.selection import find_units
from hft_trl.selection.choose import choose
from hft_trl.selection.importance import _signal_to_noise


@given(groups_of(200), RATIOS, SEEDS, st.data())
@settings(max_examples=150, deadline=None)
def test_shares_are_those_of_category_and_no_frozen_unit_outscores_a_learning_one_of_its_size(
    groups, ratio, seed, data
):
    units = make_units(groups) + make_units(groups, "norm")
    # few different scores, so that there are ties
    scores = {unit: data.draw(st.integers(0, 5)) for unit in units}
    chosen = set(choose(units, ratio, "importance", seed, scores=scores))
    at_random = choose(units, ratio, "category", seed)
    classes = defaultdict(list)
    for unit in units:
        classes[unit.category, unit.size].append(unit)
    for own in classes.values():
        assert sum(unit in chosen for unit in own) == sum(unit in at_random for unit in own)
        frozen = [scores[unit] for unit in own if unit not in chosen]
        assert all(scores[unit] >= max(frozen, default=0) for unit in own if unit in chosen)


@given(groups_of(200), RATIOS, SEEDS, st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_seed_decides_among_equal_scores_and_the_order_of_the_units_does_not(groups, ratio, seed, order):
    units = make_units(groups)
    mixed = list(units)
    order.shuffle(mixed)
    equal = dict.fromkeys(units, 1.0)
    assert choose(units, ratio, "importance", seed, scores=equal) == choose(
        mixed, ratio, "importance", seed, scores=equal
    )


def test_equal_scores_are_drawn_anew_with_each_seed():
    units = make_units([(8, [5, 5])])
    equal = dict.fromkeys(units, 1.0)
    assert len({tuple(choose(units, 0.5, "importance", seed, scores=equal)) for seed in range(5)}) == 5


def test_the_largest_weights_learn_or_the_smallest_counted_by_element():
    """A matrix with twice the elements is not taken for more important because of them."""
    model = tiny_llama(50)
    with torch.no_grad():
        for number, unit in enumerate(unit for unit in find_units(model) if unit.layer is not None):
            for name in unit.names:
                model.get_parameter(name).fill_((-1) ** number * (number + 1))
    large = select(model, HFTConfig(strategy="importance"))
    small = select(model, HFTConfig(strategy="importance", importance_order="least"))
    of_layers = {name for name in large.trainable + large.frozen if ".layers." in name}
    assert of_layers & set(large.trainable) == of_layers & set(small.frozen)
    assert large.share == small.share == select(model, HFTConfig()).share
    assert {name.split(".")[2] for name in of_layers & set(large.trainable)} == {"2", "3"}


@pytest.mark.parametrize("importance", ["snr", "wanda"])
@given(st.data())
@settings(max_examples=20, deadline=None)
def test_units_compete_with_those_of_their_slot_so_each_slot_learns_in_half_of_the_layers(importance, data):
    """The shares are those of a random half. Of two units of a slot, no frozen one has a higher score."""
    model = tiny_llama(50)
    units = [unit for unit in find_units(model) if unit.layer is not None]
    numbers = data.draw(st.permutations(range(len(units))))
    found = {name: n * unit.size for unit, n in zip(units, numbers, strict=True) for name in unit.names}
    with pytest.MonkeyPatch.context() as patch:
        scores = iter(found.values())
        patch.setattr("hft_trl.selection.importance._signal_to_noise", lambda _: next(scores))
        half = select(model, HFTConfig(strategy="importance", importance=importance), None, lambda _: found)
    assert half.share == select(model, HFTConfig()).share
    slots = defaultdict(list)
    for unit in units:
        slots[unit.slot].append((unit.names[0] in half.trainable, found[unit.names[0]]))
    for slot in slots.values():
        assert sum(learns for learns, _ in slot) == 2
        assert min(n for learns, n in slot if learns) >= max(n for learns, n in slot if not learns)


def test_the_signal_to_noise_ratio_is_that_of_the_singular_values_above_a_bound():
    """Of 10, 4, 3, 2 and 1 the quartiles are 2 and 4, so a square matrix has the bound 2 * (4 - 2) / 1.349 = 2.97."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q for _ in range(2))
    matrix = left @ torch.diag(torch.tensor([10.0, 4, 3, 2, 1])) @ right
    assert _signal_to_noise(matrix) == pytest.approx((10 + 4 + 3) / (2 + 1) / 10, rel=1e-5)
    wide = torch.cat([matrix, torch.zeros(5, 15)], dim=1)  # the bound is 1.5 * (4 - 2) / 1.349 = 2.22
    assert _signal_to_noise(wide) == pytest.approx(_signal_to_noise(wide.T)) == pytest.approx(17 / 3 / 10, rel=1e-5)
    assert _signal_to_noise(torch.stack([matrix, 2 * matrix])) == pytest.approx(0.75 * 17 / 3 / 10, rel=1e-5)
    assert _signal_to_noise(torch.ones(8)) == 0
    assert _signal_to_noise(torch.zeros(4, 4)) == 0


def test_matrices_without_noise_are_the_first_to_learn():
    """The singular values of a short and wide random matrix, such as a router's, are all above the bound."""
    model = tiny_llama(50, intermediate_size=1024)
    with torch.no_grad():
        for number in range(2):
            weight = model.model.layers[number].mlp.up_proj.weight.zero_()
            weight[:32] = torch.diag(torch.logspace(0, -3, 32))
    ratios = [_signal_to_noise(layer.mlp.up_proj.weight) for layer in model.model.layers]
    assert ratios[2:] == [float("inf")] * 2
    assert max(ratios[:2]) < float("inf")
    selection = select(model, HFTConfig(strategy="importance", importance="snr"))
    assert {f"model.layers.{number}.mlp.up_proj.weight" for number in (2, 3)} <= set(selection.trainable)


def test_it_goes_by_the_model_as_it_is_now_and_the_next_stage_may_keep_or_turn_it():
    model = tiny_llama(50)
    first = select(model, HFTConfig(strategy="importance"))
    with torch.no_grad():
        for name in first.trainable:
            model.get_parameter(name).mul_(1e-3)
    again = select(model, HFTConfig(strategy="importance"), first)
    assert again.trainable != first.trainable
    for reselect, part in (("same", first.trainable), ("complement", first.frozen)):
        kept = select(model, HFTConfig(strategy="importance", reselect=reselect), first)
        assert {name for name in kept.trainable if ".layers." in name} == {name for name in part if ".layers." in name}


def test_what_importance_is_belongs_to_the_digest_and_settings_of_other_strategies_do_not():
    model = tiny_llama(50)
    plain, important = select(model, HFTConfig()), select(model, HFTConfig(strategy="importance"))
    assert not {"importance", "importance_order", "calibration_samples"} & plain.config.selecting().keys()
    assert important.config.selecting()["importance"] == "weight_norm"
    assert "calibration_samples" not in important.config.selecting()
    gradients = HFTConfig(strategy="importance", importance="gradient_norm", calibration_samples=7)
    assert gradients.selecting()["calibration_samples"] == 7


def test_without_weights_or_a_trainer_it_says_what_is_missing():
    with torch.device("meta"):
        skeleton = tiny_llama(50)
    for importance in ("weight_norm", "snr"):
        with pytest.raises(HFTError, match=rf"{importance}.*only the model's shapes are here"):
            select(skeleton, HFTConfig(strategy="importance", importance=importance))
    for importance in ("gradient_norm", "wanda"):
        with pytest.raises(HFTError, match=f"{importance}.*needs a trainer with its data"):
            select(tiny_llama(50), HFTConfig(strategy="importance", importance=importance))


@pytest.mark.parametrize("importance", ["weight_norm", "snr"])
def test_weights_that_are_no_numbers_are_named(importance):
    model = tiny_llama(50)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(HFTError, match=r"layers\.1\.mlp\.up_proj\.weight is NaN"):
        select(model, HFTConfig(strategy="importance", importance=importance))
