"""
What moves beside the policy is in every checkpoint, or resuming is rejected:

a resumed run ends in the same bytes.
"""

import pytest
import torch
from conftest import one_line
from training import QUIET, ResumableDPOTrainer, ResumableSFTTrainer, dpo_trainer, losses, sft_trainer
from transformers import EarlyStoppingCallback
from trl import BEMACallback, DPOConfig, DPOTrainer, SFTConfig

from hft_trl import HFTConfig, HFTError
from hft_trl.chat import load_tokenizer
from hft_trl.checkpoints import moving_reference as moving
from hft_trl.recipe.rows import sft_dataset
from hft_trl.weights import fingerprint

SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 1, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("hft", {}),
        ("fft", {}),
        ("hft", {"bf16": True}),
        ("hft", {"torch_compile": True, "torch_compile_backend": "eager"}),
    ],
)
def test_a_reference_that_moves_is_resumed_where_it_was(base, ultrafeedback, tmp_path, method, settings):
    hft = HFTConfig(method=method, frozen_dtype="bfloat16" if "bf16" in settings else None)
    settings = {**SYNC, **settings}
    whole = dpo_trainer(ResumableDPOTrainer, base, ultrafeedback, tmp_path / "a", hft, **settings)
    whole.train()
    whole.save_model()
    assert not (tmp_path / "a" / moving.REFERENCE_FILE).exists()  # of checkpoints only
    resumed = dpo_trainer(ResumableDPOTrainer, base, ultrafeedback, tmp_path / "b", hft, **settings)
    resumed.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    resumed.save_model()
    assert losses(whole) == losses(resumed)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    pairs = zip(whole.ref_model.parameters(), resumed.ref_model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_checkpoint_without_the_reference_is_rejected_and_a_reference_that_rests_is_in_none(
    base, ultrafeedback, tmp_path
):
    stock = dpo_trainer(DPOTrainer, base, ultrafeedback, tmp_path / "stock", **SYNC)
    stock.train()
    ours = dpo_trainer(ResumableDPOTrainer, base, ultrafeedback, tmp_path / "a", HFTConfig(method="fft"), **SYNC)
    with pytest.raises(HFTError, match=f"has no {moving.REFERENCE_FILE}.*train into another output_dir") as error:
        ours.train(resume_from_checkpoint=tmp_path / "stock" / "checkpoint-2")
    one_line(error)
    still = {**SYNC, "sync_ref_model": False, "max_steps": 2}
    dpo_trainer(ResumableDPOTrainer, base, ultrafeedback, tmp_path / "b", **still).train()
    assert (tmp_path / "b" / "checkpoint-2").is_dir()
    assert not (tmp_path / "b" / "checkpoint-2" / moving.REFERENCE_FILE).exists()


def test_where_no_checkpoint_can_hold_it_it_is_rejected_at_start(tmp_path, monkeypatch):
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, sync_ref_model=True)
    moving.check(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(HFTError, match=r"sync_ref_model.*FSDP.*set save_strategy to 'no'"):
        moving.check(args)
    args.save_strategy = "no"
    moving.check(args)


def test_an_average_that_is_in_no_checkpoint_is_not_resumed(base, tulu, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    for resumes in (False, True):
        hft = HFTConfig(method="fft")  # TRL's callback cannot do with frozen parameters
        trainer = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, hft, **settings)
        trainer.add_callback(BEMACallback(update_freq=1))
        if not resumes:
            trainer.train()
            continue
        with pytest.raises(HFTError, match="BEMACallback averages weights over all of training"):
            trainer.train(resume_from_checkpoint=True)


def test_early_stopping_counts_on_where_it_was(base, tulu, tmp_path):
    """Also from the checkpoint that it stopped at, unless it is given more patience. Here a falling loss is worse."""
    steps = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    worse = {"metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 1e-3}

    def trained(name, resume=None, patience=2):
        trainer = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / name, HFTConfig(), **steps, **worse)
        trainer.add_callback(EarlyStoppingCallback(patience))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained("whole")
    assert whole.state.global_step == 3
    for step in (2, 3):
        resumed = trained(f"from {step}", tmp_path / "whole" / f"checkpoint-{step}")
        assert resumed.state.global_step == 3
        pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert trained("longer", tmp_path / "whole" / "checkpoint-3", patience=4).state.global_step == 5


def test_a_stream_resumes_in_the_pass_that_it_was_in(base, tulu, tmp_path):
    """transformers counts as if one pass were as long as all steps. Here it is two steps and a batch."""
    rows = sft_dataset(tulu, "tulu").select(range(20)).to_iterable_dataset(num_shards=2).shuffle(1, buffer_size=8)
    settings = {**QUIET, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    found = []
    for name, step in (("whole", None), ("end of a pass", 2), ("second pass", 3)):
        args = SFTConfig(str(tmp_path / name), **settings)
        trainer = ResumableSFTTrainer(
            str(base), args=args, train_dataset=rows, processing_class=load_tokenizer(str(base))
        )
        trainer.train(resume_from_checkpoint=tmp_path / "whole" / f"checkpoint-{step}" if step else None)
        found.append((losses(trainer), [fingerprint(parameter) for parameter in trainer.model.parameters()]))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sft", {"neftune_noise_alpha": 5.0}),
        ("dpo", {"precompute_ref_log_probs": True}),
        ("dpo", {"loss_type": ["bco_pair"]}),
    ],
)
def test_random_and_precomputed_state_resumes_exactly(base, tulu, ultrafeedback, tmp_path, kind, settings):
    """The noise of NEFTune comes from random states that are saved; log-probs are those of the start model again."""
    settings = {**settings, "save_strategy": "steps", "save_steps": 2}
    for name, checkpoint in (("a", None), ("b", tmp_path / "a" / "checkpoint-2")):
        if kind == "sft":
            trainer = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / name, HFTConfig(), **settings)
        else:
            trainer = dpo_trainer(ResumableDPOTrainer, base, ultrafeedback, tmp_path / name, HFTConfig(), **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
