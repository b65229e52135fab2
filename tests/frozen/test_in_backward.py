"""The optimizer inside of the backward pass: the same training to the last bit, with one gradient at a time."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from steps import real_step
from training import ResumableSFTTrainer, dpo_trainer, losses, sft_trainer
from trl import SFTConfig, SFTTrainer
from trl.trainer import sft_trainer as sft_module

from hft_trl import HFTConfig, HFTDPOTrainer, HFTError, HFTSFTTrainer
from hft_trl.continual.gem import check_gem
from hft_trl.trainers.compatibility import INDEPENDENT, check

TEXT = Dataset.from_dict({"text": ["Ada lives in Rome."] * 8})
UNCLIPPED = {"max_grad_norm": 0, "weight_decay": 0.1}


def logged(trainer, *keys):
    return [[row[key] for key in keys] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("optim", INDEPENDENT)
def test_losses_schedule_and_weights_are_those_of_the_optimizer_after_it(base, tulu, tmp_path, optim):
    """With weight decay on some groups only, and whatever optimizer is taken."""
    runs = []
    for inside in (False, True):
        hft = HFTConfig(optimizer_in_backward=inside)
        trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / str(inside), hft, optim=optim, **UNCLIPPED)
        trainer.train()
        trainer.save_model()
        runs.append(logged(trainer, "loss", "learning_rate"))
        assert ["grad_norm" in row for row in trainer.state.log_history if "loss" in row] == [not inside] * 4
    assert runs[0] == runs[1]
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("False", "True"))
    assert a == b


@pytest.mark.parametrize("kind", ["tied", "checkpointing", "fft", "dpo", "bfloat16", "nf4", "gradients"])
def test_it_is_the_same_training_in_every_other_way_too(base, tulu, ultrafeedback, tmp_path, tokenizer, kind):
    """
    Of a tied parameter the gradient is whole when it is used; what a checkpointed layer computes again is not yet
    updated.
    """
    if kind == "tied":
        base = tmp_path / "tied"
        tiny_llama(len(tokenizer), tie_word_embeddings=True).save_pretrained(base)
        tokenizer.save_pretrained(base)
    settings = {**UNCLIPPED, "bf16": kind == "bfloat16", "gradient_checkpointing": kind == "checkpointing"}
    storage = {
        "bfloat16": {"frozen_dtype": "bfloat16"},
        "nf4": {"frozen_quantization": "nf4"},
        "gradients": {"strategy": "importance", "importance": "gradient_norm", "calibration_samples": 2},
    }.get(kind, {})
    runs = []
    for inside in (False, True):
        hft = HFTConfig("fft" if kind == "fft" else "hft", optimizer_in_backward=inside, **storage)
        if kind == "dpo":
            trainer = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path / str(inside), hft, **settings)
        else:
            trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / str(inside), hft, **settings)
        trainer.train()
        trainer.save_model()
        runs.append((losses(trainer), (tmp_path / str(inside) / "model.safetensors").read_bytes()))
    assert runs[0] == runs[1]


def test_there_is_one_gradient_at_a_time(base, tulu, tmp_path):
    """The most that gradients take is the largest of them, no longer all of them."""
    most = {}
    for inside in (False, True):
        hft = HFTConfig(optimizer_in_backward=inside)
        trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, hft, **UNCLIPPED)
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        seen = []

        def count(_, trained=trained, seen=seen):
            seen.append(sum(p.grad.nbytes for p in trained if p.grad is not None))

        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(count)
        trainer.train()
        most[inside] = max(seen)
        assert len(seen) == 4 * len(trained)
    assert most == {False: sum(p.nbytes for p in trained), True: max(p.nbytes for p in trained)}


def test_the_peak_of_a_step_is_lower_by_the_gradients(tokenizer, tmp_path):
    """Every storage of a step counted: without the other gradients, and with what one update needs."""
    size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    tiny_llama(len(tokenizer), **size).save_pretrained(tmp_path / "base")
    found = {}
    for inside in (False, True):
        hft = HFTConfig(optimizer_in_backward=inside)
        found[inside] = real_step(
            str(tmp_path / "base"), tokenizer, str(tmp_path / "out"), "sft", hft, 1, 16, max_grad_norm=0
        )
    trained = [p.nbytes for p in found[True].model.parameters() if p.requires_grad]
    assert found[False].gradients == sum(trained)
    assert found[True].gradients == 0
    # What is left is the peak before the first gradient, of the head that TRL computes in tiles
    saved = found[False].peak - found[True].peak
    assert saved > 0.8 * (sum(trained) - max(trained))


def test_runs_resume_to_the_same_bytes_with_and_without_it(base, tulu, tmp_path):
    """The optimizer's state is saved as ever, so a run may go on in the other way, too."""
    for name, inside, start in (
        ("a", True, None),
        ("b", True, "a"),
        ("c", False, "a"),
        ("d", False, None),
        ("e", True, "d"),
    ):
        hft = HFTConfig(optimizer_in_backward=inside)
        every = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
        trainer = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / name, hft, **UNCLIPPED, **every)
        trainer.train(resume_from_checkpoint=start and tmp_path / start / "checkpoint-2")
        trainer.save_model()
    files = {(tmp_path / name / "model.safetensors").read_bytes() for name in "abcde"}
    assert len(files) == 1
    states = [(tmp_path / name / "checkpoint-4" / "optimizer.pt").read_bytes() for name in "ab"]
    assert states[0] == states[1]


def test_a_loss_that_is_no_number_stops_before_a_checkpoint_is_saved(base, tulu, tmp_path, monkeypatch):
    hft = HFTConfig(optimizer_in_backward=True)
    trainer = sft_trainer(
        ResumableSFTTrainer, base, tulu, tmp_path, hft, **UNCLIPPED, save_strategy="steps", save_steps=1
    )
    plain = SFTTrainer.compute_loss

    def third_is_nan(self, *args, **kwargs):
        loss = plain(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 2 else loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", third_is_nan)
    with pytest.raises(HFTError, match=r"the loss is nan at step 3: .*the last checkpoint is .*checkpoint-2"):
        trainer.train()
    assert not (tmp_path / "checkpoint-3").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"max_grad_norm": 1.0},
            "max_grad_norm is 1, and clipping needs the norm of all gradients.*set max_grad_norm to 0",
        ),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2"),
        ({"optim": "lion_8bit"}, "optim is lion_8bit, which was not tested with it: use one of adamw_torch"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"fsdp": "full_shard"}, "FSDP keeps gradients itself"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "set use_reentrant to false"),
        ({"activation_checkpointing_kwargs": {"preserve_rng_state": False}}, "set use_reentrant to false"),
    ],
)
def test_what_needs_all_gradients_is_refused_before_a_model_is_loaded(tmp_path, settings, words):
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, **{"max_grad_norm": 0, **settings})
    with pytest.raises(HFTError, match=f"hft.optimizer_in_backward is true, but .*{words}"):
        check(args, HFTConfig(optimizer_in_backward=True))
    check(args, HFTConfig())


@pytest.mark.parametrize(
    "keywords",
    [
        None,
        {},
        {"use_reentrant": False},
        {"every_n_layers": 2},
        {"offload": False},
        {"selective": True, "debug": False},
    ],
)
def test_checkpointing_that_is_not_reentrant_is_accepted(tmp_path, keywords):
    args = SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_grad_norm=0, activation_checkpointing_kwargs=keywords
    )
    assert args.activation_checkpointing
    check(args, HFTConfig(optimizer_in_backward=True))


def test_no_clipping_is_also_said_by_none(tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_grad_norm=None)
    check(args, HFTConfig(optimizer_in_backward=True))


@pytest.mark.parametrize(("name", "value"), [("world_size", 2), ("n_gpu", 2), ("fp16", True)])
def test_several_gpus_and_scaled_gradients_are_refused(tmp_path, name, value):
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_grad_norm=0)
    seen = {key: getattr(args, key) for key in ("world_size", "n_gpu", "deepspeed_plugin", "fsdp_plugin_args")}
    with pytest.raises(HFTError, match=r"hft\.optimizer_in_backward is true, but"):
        check(SimpleNamespace(**{**vars(args), **seen, name: value}), HFTConfig(optimizer_in_backward=True))


def test_optimizers_of_the_users_own_and_gem_are_refused(base, tmp_path):
    hft = HFTConfig(optimizer_in_backward=True)
    given = {"model": str(base), "train_dataset": TEXT, "hft_config": hft}
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_grad_norm=0)
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(HFTError, match="but optimizers was passed"):
        HFTSFTTrainer(**given, args=args, optimizers=(adamw, None))
    with pytest.raises(HFTError, match="but optimizer_cls_and_kwargs was passed"):
        HFTSFTTrainer(**given, args=args, optimizer_cls_and_kwargs=(torch.optim.AdamW, {}))
    with pytest.raises(HFTError, match="frees the gradients that gem compares"):
        check_gem(args, hft)


def test_arguments_that_are_left_to_trl_are_checked_too(base, tmp_path, monkeypatch):
    """TRL's own default clips."""
    monkeypatch.chdir(tmp_path)  # its output_dir is relative
    monkeypatch.setattr(sft_module, "SFTConfig", partial(SFTConfig, use_cpu=True, bf16=False))
    hft = HFTConfig(optimizer_in_backward=True)
    with pytest.raises(HFTError, match="set max_grad_norm to 0"):
        HFTSFTTrainer(model=str(base), train_dataset=TEXT, hft_config=hft)
