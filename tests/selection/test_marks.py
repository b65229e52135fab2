"""What a model object remembers: stages in memory draw as from the disk, and what the user froze stays frozen."""

import pytest
import torch
from conftest import tiny_llama
from training import dpo_trainer, sft_trainer
from transformers import AutoModelForCausalLM

from hft_trl import HFTConfig, HFTDPOTrainer, HFTError, HFTSFTTrainer, Selection, select
from hft_trl.selection.previous import selection_of
from hft_trl.selection.units import frozen_by_hft, frozen_by_user

EMBEDDING = "model.embed_tokens.weight"


def chained(base, tulu, folder, **config):
    """A trained stage that is saved, and two second stages: from its folder, and from its model in memory."""
    first = sft_trainer(HFTSFTTrainer, base, tulu, folder / "first", HFTConfig())
    first.train()
    first.save_model()
    starts = str(folder / "first"), first.model
    return first, [
        sft_trainer(HFTSFTTrainer, start, tulu, folder / f"second-{number}", HFTConfig(**config))
        for number, start in enumerate(starts)
    ]


@pytest.mark.parametrize("reselect", ["fresh", "same", "complement"])
def test_a_stage_in_memory_draws_what_it_draws_from_the_disk(base, tulu, tmp_path, reselect):
    first, (from_disk, in_memory) = chained(base, tulu, tmp_path, reselect=reselect)
    assert in_memory.hft_selection.digest == from_disk.hft_selection.digest
    layers = [{name for name in t.hft_selection.trainable if ".layers." in name} for t in (first, in_memory)]
    assert (layers[0] == layers[1]) is (reselect == "same")
    assert layers[0].isdisjoint(layers[1]) is (reselect == "complement")


def test_preference_training_in_memory_draws_a_fresh_half_too(base, tulu, ultrafeedback, tmp_path):
    first = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "sft", HFTConfig())
    first.train()
    first.save_model()
    start = str(tmp_path / "sft")
    digests = {
        dpo_trainer(HFTDPOTrainer, model, ultrafeedback, tmp_path / "dpo", HFTConfig(), ref).hft_selection.digest
        for model, ref in ((first.model, AutoModelForCausalLM.from_pretrained(start)), (start, None))
    }
    assert len(digests) == 1
    assert first.hft_selection.digest not in digests


def test_a_trainer_that_is_built_again_without_training_draws_the_same_half(base, tulu, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    built = [sft_trainer(HFTSFTTrainer, model, tulu, tmp_path, HFTConfig()) for _ in range(2)]
    assert len({trainer.hft_selection.digest for trainer in built}) == 1
    assert frozen_by_user(model) == frozenset()
    assert selection_of(model) is None
    built[1].train()
    assert selection_of(model).digest == built[1].hft_selection.digest


def test_what_the_user_froze_stays_frozen_outside_of_the_shares(base, tulu, tmp_path, capsys):
    """Through two stages in memory, bit for bit; what the first selection froze is not taken for the user's."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.get_input_embeddings().requires_grad_(False)
    before = model.get_input_embeddings().weight.clone()
    for stage in range(2):
        trainer = sft_trainer(HFTSFTTrainer, model, tulu, tmp_path, HFTConfig())
        assert "1 parameters, such as model.embed_tokens.weight, were frozen before" in capsys.readouterr().out
        selection = trainer.hft_selection
        assert EMBEDDING not in (*selection.trainable, *selection.frozen), stage
        assert selection.share["layers"] == 0.5
        assert EMBEDDING in trainer.frozen_half.digests
        trainer.train()
        trainer.save_model()
        assert Selection.load(tmp_path).digest == selection.digest
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_full_fine_tuning_after_a_half_trains_all_but_what_the_user_froze():
    model = tiny_llama(50)
    model.model.norm.requires_grad_(False)
    select(model, HFTConfig()).apply(model)
    assert frozen_by_hft(model)
    select(model, HFTConfig(method="fft")).apply(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]


def test_full_fine_tuning_of_frozen_layers_records_what_is_trained_outside_of_them():
    model = tiny_llama(50)
    model.model.layers.requires_grad_(False)
    selection = select(model, HFTConfig(method="fft"))
    assert set(selection.trainable) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert selection.frozen == ()


def test_a_model_that_the_user_froze_wholly_is_refused():
    model = tiny_llama(50)
    model.requires_grad_(False)
    with pytest.raises(HFTError, match=r"had requires_grad=False before.* one after model\.requires_grad_\(True\)"):
        select(model, HFTConfig())
