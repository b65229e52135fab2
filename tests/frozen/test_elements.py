"""Strategy "element": masks of exactly the ratio that can be drawn again, and frozen elements that keep their bits."""

import json
from dataclasses import replace
from fractions import Fraction
from math import floor

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from test_choose import RATIOS, SEEDS, groups_of, make_units
from training import QUIET, dpo_trainer, losses, sft_trainer, weights
from trl import SFTConfig, SFTTrainer

from hft_trl import HFTConfig, HFTDPOTrainer, HFTError, HFTSFTTrainer, Selection, select
from hft_trl.saved_models.diff import compare
from hft_trl.saved_models.diff_view import verdict
from hft_trl.selection.masks import draw_masks

ELEMENT = HFTConfig(strategy="element")


@given(groups_of(60), RATIOS, SEEDS)
@settings(max_examples=100, deadline=None)
def test_the_ratio_is_met_to_one_element_in_each_category_and_each_parameter(groups, ratio, seed):
    units = make_units(groups) + make_units(groups, "norm")
    sizes = {unit.names[0]: unit.size for unit in units}
    masks = draw_masks(units, ratio, seed, sizes)
    for category in ("attention", "norm"):
        own = [unit.names[0] for unit in units if unit.category == category]
        drawn = {name: int(masks.draw(name, (sizes[name],)).sum()) for name in own}
        assert drawn == {name: masks.learning[name] for name in own}
        goal = Fraction(str(ratio)) * sum(sizes[name] for name in own)
        assert sum(drawn.values()) == floor(goal + Fraction(1, 2))
        assert all(abs(number - Fraction(str(ratio)) * sizes[name]) < 1 for name, number in drawn.items())


@given(groups_of(60), RATIOS, SEEDS)
@settings(max_examples=30, deadline=None)
def test_the_complement_is_what_was_frozen(groups, ratio, seed):
    units = make_units(groups)
    sizes = {unit.names[0]: unit.size for unit in units}
    masks = draw_masks(units, ratio, seed, sizes)
    other = masks.complement(sizes)
    for name, size in sizes.items():
        assert torch.equal(masks.draw(name, (size,)), ~other.draw(name, (size,)))
    assert other.complement(sizes) == masks


def test_masks_are_random_in_each_parameter_and_leave_global_random_state_alone():
    units = make_units([(1, [4096, 4096])])
    sizes = {unit.names[0]: 4096 for unit in units}
    before = torch.get_rng_state()
    (a, b), (c, _) = ([draw_masks(units, 0.5, seed, sizes).draw(name, (64, 64)) for name in sizes] for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in ((a, b), (a, c)):  # binomial(4096, 1/2) is within 250 of 2048 but for 1 in 10^14
        assert abs(int((one == other).sum()) - 2048) < 250


def test_the_draw_of_today_is_the_draw_of_tomorrow():
    """Runs are resumed and compared later on: the same seed must go on giving the same masks."""
    (unit,) = make_units([(1, [16])])
    mask = draw_masks([unit], 0.5, 42, {unit.names[0]: 16}).draw(unit.names[0], (16,))
    assert "".join(str(int(bit)) for bit in mask) == "0010011010111100"


def test_a_mask_that_is_drawn_otherwise_is_refused():
    """As by a torch whose generator gives other numbers."""
    model = tiny_llama(50)
    masks = select(model, ELEMENT).masks
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(HFTError, match=rf"mask of {name} cannot be drawn again"):
        replace(masks, seed=masks.seed + 1).draw(name, model.get_parameter(name).shape)


def test_a_selection_of_elements_has_the_shares_and_is_saved_loaded_and_turned(tmp_path):
    model = tiny_llama(50)
    first = select(model, replace(ELEMENT, ratio=0.25, train_lm_head=False))
    assert first.share["layers"] == first.share["attention"] == first.share["norm"] == 0.25
    assert first.frozen == ("lm_head.weight",)
    first.save(tmp_path)
    assert Selection.load(tmp_path) == first
    content = json.loads((tmp_path / "hft_selection.json").read_text())
    content["masks"]["seed"] += 1
    (tmp_path / "hft_selection.json").write_text(json.dumps(content))
    with pytest.raises(HFTError, match="changed after it was saved"):
        Selection.load(tmp_path)
    other = select(model, replace(ELEMENT, reselect="complement"), first)
    assert other.share["layers"] == 0.75
    assert select(model, replace(ELEMENT, reselect="same"), first).masks == first.masks
    assert select(model, ELEMENT, first).masks.seed not in (first.masks.seed, 42)
    without = select(model, replace(ELEMENT, reselect="same", exclude=["up_proj"]), first)
    assert set(without.masked) < set(without.trainable)


def test_ratio_one_needs_no_masks():
    assert select(tiny_llama(50), replace(ELEMENT, ratio=1.0)).masks is None


def frozen_bits_are_kept(base, folder, selection: Selection) -> None:
    before, after = weights(base), weights(folder)
    for name in selection.masked:
        learns = selection.masks.draw(name, before[name].shape)
        assert before[name][~learns].numpy().tobytes() == after[name][~learns].numpy().tobytes(), name
        moved = (before[name] != after[name])[learns]
        assert moved.float().mean() > 0.5, name


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adamw_torch"},
        {"optim": "adamw_torch_fused", "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 1.0},
        {"optim": "adafactor"},
        {"optim": "adamw_bnb_8bit"},
    ],
    ids=lambda settings: settings["optim"],
)
def test_weight_decay_momentum_and_clipping_leave_frozen_elements_alone(base, tulu, tmp_path, settings):
    settings = {"weight_decay": 0.1, "max_grad_norm": 0.5, **settings}
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, ELEMENT, **settings)
    trainer.train()
    trainer.save_model()
    frozen_bits_are_kept(base, tmp_path, trainer.hft_selection)


def test_gradients_and_moments_of_frozen_elements_are_zero(base, tulu, tmp_path):
    """So the norm that clipping goes by is that of the elements that learn."""
    seen = {}

    class Watching(HFTSFTTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen.update({name: p.grad.clone() for name, p in self.model.named_parameters()})
            return loss

    trainer = sft_trainer(Watching, base, tulu, tmp_path, ELEMENT)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if name in trainer.hft_selection.masked:
            learns = trainer.hft_selection.masks.draw(name, parameter.shape)
            for tensor in (seen[name], trainer.optimizer.state[parameter]["exp_avg"]):
                assert not tensor[~learns].any()
                assert tensor[learns].any()


def test_resuming_is_identical_to_not_having_stopped(base, tulu, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1}
    for folder, checkpoint in (("a", None), ("b", tmp_path / "a" / "checkpoint-2")):
        trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / folder, ELEMENT, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    for another, differs in (
        (HFTConfig(), "strategy 'element' there, 'category' here"),
        (replace(ELEMENT, seed=1), "seed 42"),
    ):
        other = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "c", another, **settings)
        with pytest.raises(HFTError, match=differs):
            other.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")


def test_a_trainer_that_goes_on_with_the_model_in_memory_is_free_of_the_masks(base, tulu, tmp_path):
    first = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "a", ELEMENT)
    first.train()
    before = {name: p.detach().clone() for name, p in first.model.named_parameters()}
    args = SFTConfig(str(tmp_path / "b"), **{**QUIET, "assistant_only_loss": True})
    SFTTrainer(first.model, args, train_dataset=first.train_dataset, processing_class=first.processing_class).train()
    for name in first.hft_selection.masked:
        assert (first.model.get_parameter(name) != before[name]).float().mean() > 0.9, name


def test_a_frozen_element_that_moves_ends_training_in_an_error(base, tulu, tmp_path):
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, ELEMENT, max_steps=1)
    name = "model.layers.2.self_attn.q_proj.weight"
    parameter = trainer.model.get_parameter(name)
    place = (~trainer.hft_selection.masks.draw(name, parameter.shape)).nonzero()[0]
    with torch.no_grad():
        parameter[tuple(place)] += 1
    with pytest.raises(RuntimeError, match=f"a frozen element of {name} moved"):
        trainer.save_model()


def test_the_next_stage_trains_the_other_elements_against_a_reference_with_the_right_losses(
    base, tulu, ultrafeedback, tmp_path
):
    sft = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "sft", ELEMENT)
    sft.train()
    sft.save_model()
    runs = []
    for share in (True, False):
        hft = replace(ELEMENT, reselect="complement", share_reference=share, train_embeddings=False)
        dpo = dpo_trainer(HFTDPOTrainer, tmp_path / "sft", ultrafeedback, tmp_path / f"dpo-{share}", hft)
        dpo.train()
        dpo.save_model()
        runs.append(losses(dpo))
    assert runs[0] == runs[1]
    assert runs[0][0] == pytest.approx(0.693147, abs=1e-5)
    assert runs[0][-1] < 0.6
    first, second = Selection.load(tmp_path / "sft"), Selection.load(tmp_path / "dpo-True")
    frozen_bits_are_kept(tmp_path / "sft", tmp_path / "dpo-True", second)
    name = "model.layers.1.mlp.gate_proj.weight"
    shape = weights(base)[name].shape
    assert torch.equal(first.masks.draw(name, shape), ~second.masks.draw(name, shape))


def test_diff_draws_the_masks_again_and_finds_a_single_bit(base, tulu, tmp_path):
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "sft", ELEMENT)
    trainer.train()
    trainer.save_model()
    (diff,) = compare(str(base), [str(tmp_path / "sft")])
    assert diff.byte_identical
    assert "frozen half byte-identical" in verdict(diff)
    name, file = "model.layers.0.mlp.down_proj.weight", tmp_path / "sft" / "model.safetensors"
    tensors = load_file(file)
    place = (~trainer.hft_selection.masks.draw(name, tensors[name].shape)).nonzero()[-1]
    tensors[name].view(torch.int32)[tuple(place)] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    (diff,) = compare(str(base), [str(tmp_path / "sft")])
    assert diff.touched == [name]
    assert "frozen half is NOT" in verdict(diff)


def test_an_optimizer_that_steps_for_each_parameter_is_refused(base, tulu, tmp_path):
    """All frozen elements would be put back as often."""
    with pytest.raises(HFTError, match=r"with hft\.optimizer_in_backward there is one for each parameter"):
        sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, replace(ELEMENT, optimizer_in_backward=True), max_grad_norm=0)


@pytest.mark.parametrize("setting", [{"frozen_dtype": "bfloat16"}, {"frozen_quantization": "nf4"}])
def test_what_would_save_nothing_is_refused_also_where_the_stage_before_had_the_masks(base, tulu, tmp_path, setting):
    refusal = rf"it freezes no parameter of the layers as a whole, so hft\.{next(iter(setting))} would save nothing"
    with pytest.raises(HFTError, match=rf"hft\.strategy is 'element', .*{refusal}"):
        sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, replace(ELEMENT, **setting), bf16=True)
    start = tmp_path / "start"
    for file in base.iterdir():
        (start / file.name).parent.mkdir(exist_ok=True)
        (start / file.name).write_bytes(file.read_bytes())
    select(tiny_llama(300), ELEMENT).save(start)
    with pytest.raises(HFTError, match=rf"hft\.reselect is 'same' after strategy element, .*{refusal}"):
        sft_trainer(HFTSFTTrainer, start, tulu, tmp_path, HFTConfig(reselect="same", **setting), bf16=True)
