"""A frozen half that is whole in every process: where it can be had, and what is said where it changes nothing."""

import pytest
from conftest import QUIET
from training import losses, sft_trainer
from trl import SFTConfig

from hft_trl import HFTConfig, HFTError, HFTSFTTrainer
from hft_trl.backends.fsdp import replicates_frozen
from hft_trl.recipe.arguments import DataArguments, ModelArguments
from hft_trl.recipe.stage import Stage

ON = HFTConfig(replicate_frozen=True)


def test_it_is_wanted_under_fsdp2_only(monkeypatch, tmp_path):
    args = SFTConfig(str(tmp_path), **QUIET)
    assert not replicates_frozen(ON, args)
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, value)
    assert replicates_frozen(ON, args)
    assert replicates_frozen(ON, None)
    assert not replicates_frozen(HFTConfig(), args)
    assert not replicates_frozen(HFTConfig(method="fft", replicate_frozen=True), args)


def test_deepspeed_is_refused_before_the_model_is_loaded(tmp_path):
    args = SFTConfig(str(tmp_path), **QUIET)
    args.deepspeed_plugin = object()
    with pytest.raises(HFTError, match=r"hft\.replicate_frozen is true, but DeepSpeed stores"):
        HFTSFTTrainer(model="no/such-model", args=args, train_dataset=None, hft_config=ON)


def test_a_recipe_refuses_it_when_its_settings_are_read(tmp_path):
    args = SFTConfig(str(tmp_path), **QUIET)
    args.deepspeed_plugin = object()
    with pytest.raises(HFTError, match=r"hft\.replicate_frozen is true, but DeepSpeed stores"):
        Stage("sft", ModelArguments("demo"), DataArguments("demo"), args, ON)


@pytest.mark.parametrize(
    ("method", "words"), [("hft", "changes nothing without FSDP2"), ("fft", "changes nothing with method fft")]
)
def test_in_one_process_it_is_said_to_change_nothing_and_does_not(base, tulu, tmp_path, capsys, method, words):
    runs = []
    for replicate in (False, True):
        hft = HFTConfig(method=method, replicate_frozen=replicate)
        trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / str(replicate), hft, max_steps=2)
        trainer.train()
        runs.append(losses(trainer))
        assert (words in capsys.readouterr().out) == replicate
    assert runs[0] == runs[1]


def test_it_is_no_part_of_a_selection():
    """So a run may go on with another choice, and from a model that was trained with another."""
    assert ON.selecting() == HFTConfig().selecting()
