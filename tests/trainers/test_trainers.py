"""The trainers: only the chosen half learns, nothing else about TRL's trainers changes."""

import dataclasses
import json
import logging
import shutil

import pytest
import torch
from conftest import one_line, tiny_llama
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from training import QUIET, HFTKTOTrainer, ResumableSFTTrainer, dpo_trainer, losses, sft_trainer, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import BEMACallback, DPOTrainer, KTOConfig, SFTConfig, SFTTrainer, SyncRefModelCallback

from hft_trl import HFTConfig, HFTDPOTrainer, HFTError, HFTMixin, HFTSFTTrainer, Selection, demo, select
from hft_trl.chat import load_tokenizer
from hft_trl.frozen.smaller_type import start_files
from hft_trl.recipe.rows import sft_dataset


class Interrupts(TrainerCallback):
    """Ctrl-C after the first step."""

    def on_step_end(self, *_, **__):
        raise KeyboardInterrupt


def test_frozen_bits_equal_the_base_in_the_saved_file_and_every_trainable_matrix_moves(base, tulu, tmp_path):
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(seed=3))
    trainer.train()
    trainer.save_model()
    before, after, selection = weights(base), weights(tmp_path), Selection.load(tmp_path)
    assert set(selection.trainable) | set(selection.frozen) == set(before) == set(after)
    for name in selection.frozen:
        assert before[name].numpy().tobytes() == after[name].numpy().tobytes()
    for name in selection.trainable:
        assert not torch.equal(before[name], after[name]), name


def test_the_optimizer_holds_trainable_parameters_only(base, tulu, tmp_path):
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig())
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    named = dict(trainer.model.named_parameters())
    assert held == {id(named[name]) for name in trainer.hft_selection.trainable}
    assert all(named[name].grad is None for name in trainer.hft_selection.frozen)


def test_hft_is_the_default_as_one_changed_line_says(base, tulu, tmp_path):
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path)
    assert trainer.hft_config == HFTConfig()
    assert trainer.hft_selection.digest == select(trainer.model, HFTConfig()).digest
    assert len(trainer.hft_selection.frozen) > 0


def test_one_line_says_that_hft_is_active_on_the_main_process_only(base, tulu, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("hft_trl.trainers.mixin.logger.warning", lines.append)
    sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(method="fft"))
    assert lines == []
    sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(seed=3)).train()
    (line,) = lines
    assert line.startswith("HFT is active: 50.0% of the layers learn (strategy category, seed 3)")
    monkeypatch.setattr(HFTSFTTrainer, "is_world_process_zero", lambda _: False)
    sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig())
    assert len(lines) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fft_is_bit_identical_to_trls_sft_trainer(base, tulu, tmp_path, checkpointing):
    ours = sft_trainer(
        HFTSFTTrainer, base, tulu, tmp_path / "a", HFTConfig(method="fft"), gradient_checkpointing=checkpointing
    )
    theirs = sft_trainer(SFTTrainer, base, tulu, tmp_path / "b", gradient_checkpointing=checkpointing)
    for trainer in (ours, theirs):
        trainer.train()
        trainer.save_model()
    assert losses(ours) == losses(theirs)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a | b)
    assert ours.hft_selection.frozen == ()


def test_fft_leaves_to_the_parent_what_hft_checks(base, ultrafeedback, tmp_path, caplog, monkeypatch):
    """
    A policy that was edited in memory, an optimizer of frozen parameters, a full evaluation.

    No error, no word, the same bits.
    """
    monkeypatch.setattr(logging.getLogger("hft_trl"), "propagate", True)
    runs = []
    for kind, name, hft in ((HFTDPOTrainer, "a", HFTConfig(method="fft")), (DPOTrainer, "b", None)):
        policy = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            policy.model.layers[1].mlp.up_proj.weight.add_(0.1)
        policy.lm_head.requires_grad_(False)
        trainer = dpo_trainer(kind, policy, ultrafeedback, tmp_path / name, hft, eval_rows=8, bf16_full_eval=True)
        trainer.create_optimizer()
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        state = [
            (n, p.requires_grad, p.dtype) for m in (trainer.model, trainer.ref_model) for n, p in m.named_parameters()
        ]
        runs.append((losses(trainer), evaluated, state, [type(c) for c in trainer.callback_handler.callbacks]))
        assert losses(trainer)[0] != pytest.approx(0.693147, abs=1e-5)
    assert runs[0] == runs[1]
    assert not [record for record in caplog.records if record.name.startswith("hft_trl") and "rows" not in record.name]


def test_fft_is_bit_identical_to_trls_dpo_trainer(base, ultrafeedback, tmp_path):
    ours = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path / "a", HFTConfig(method="fft"))
    theirs = dpo_trainer(DPOTrainer, base, ultrafeedback, tmp_path / "b")
    for trainer in (ours, theirs):
        trainer.train()
    assert losses(ours) == losses(theirs)
    a, b = dict(ours.model.named_parameters()), dict(theirs.model.named_parameters())
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_trains_the_same_half_even_with_a_frozen_embedding(base, tulu, tmp_path, reentrant):
    """Checkpointing, reentrant or not, changes memory and time only."""
    hft = HFTConfig(train_embeddings=False)
    plain = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "a", hft)
    checkpointed = sft_trainer(
        HFTSFTTrainer,
        base,
        tulu,
        tmp_path / "b",
        hft,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    for trainer in (plain, checkpointed):
        trainer.train()
        trainer.save_model()
    assert losses(plain) == pytest.approx(losses(checkpointed), abs=1e-5)
    before, a, b = weights(base), weights(tmp_path / "a"), weights(tmp_path / "b")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3)
    assert torch.equal(before["model.embed_tokens.weight"], b["model.embed_tokens.weight"])
    assert all(not torch.equal(before[name], b[name]) for name in checkpointed.hft_selection.trainable)


def test_a_fresh_half_follows_in_dpo_and_the_reference_is_frozen_and_the_start(base, tulu, ultrafeedback, tmp_path):
    sft = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "sft", HFTConfig())
    sft.train()
    sft.save_model()
    dpo = dpo_trainer(HFTDPOTrainer, tmp_path / "sft", ultrafeedback, tmp_path / "dpo", HFTConfig())
    assert dpo.hft_selection.trainable != sft.hft_selection.trainable
    assert not dpo.ref_model.training
    assert not any(p.requires_grad for p in dpo.ref_model.parameters())
    start = {name: p.clone() for name, p in dpo.ref_model.named_parameters()}
    dpo.train()
    assert losses(dpo)[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses(dpo)[-1] < losses(dpo)[0]
    assert all(torch.equal(p, start[name]) for name, p in dpo.ref_model.named_parameters())
    dpo.save_model()
    before, after = weights(tmp_path / "sft"), weights(tmp_path / "dpo")
    assert all(torch.equal(before[name], after[name]) for name in dpo.hft_selection.frozen)


@pytest.mark.parametrize(("reselect", "same"), [("same", True), ("complement", False)])
def test_reselect_relates_a_stage_to_the_selection_of_its_start_model(base, tulu, tmp_path, reselect, same):
    first = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "1", HFTConfig())
    first.save_model()
    second = sft_trainer(HFTSFTTrainer, tmp_path / "1", tulu, tmp_path / "2", HFTConfig(reselect=reselect))
    layers = {name for name in second.hft_selection.trainable if ".layers." in name}
    expected = first.hft_selection.trainable if same else first.hft_selection.frozen
    assert layers == {name for name in expected if ".layers." in name}


def test_a_stage_after_an_interrupted_one_draws_the_same_half_in_memory_and_from_disk(base, tulu, tmp_path):
    first = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "1", HFTConfig())
    first.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    first.save_model()
    in_memory = sft_trainer(HFTSFTTrainer, first.model, tulu, tmp_path / "2", HFTConfig())
    from_disk = sft_trainer(HFTSFTTrainer, tmp_path / "1", tulu, tmp_path / "3", HFTConfig())
    assert in_memory.hft_selection == from_disk.hft_selection != first.hft_selection


def test_a_stage_that_trains_in_the_folder_of_its_start_model_resumes(base, tulu, tmp_path):
    """The folder holds the start model and its selection until the stage is saved."""
    folder, settings = tmp_path / "run", {"save_strategy": "steps", "save_steps": 2}
    shutil.copytree(base, folder)
    first = sft_trainer(HFTSFTTrainer, folder, tulu, folder, HFTConfig())
    first.save_model()
    second = sft_trainer(HFTSFTTrainer, folder, tulu, folder, HFTConfig(), max_steps=2, **settings)
    second.train()
    assert Selection.load(folder) == first.hft_selection
    resumed = sft_trainer(HFTSFTTrainer, folder, tulu, folder, HFTConfig(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    resumed.save_model()
    assert Selection.load(folder) == second.hft_selection != first.hft_selection


def test_a_stage_follows_the_revision_that_it_starts_from(base, tulu, tmp_path, monkeypatch):
    """Its selection and its files, not those of the main branch, which has another model."""
    first = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "1", HFTConfig())
    first.save_model()
    repository = tmp_path / "models--org--model"
    small = repository / "snapshots" / ("2" * 40)
    shutil.copytree(tmp_path / "1", small)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(small)
    shutil.copytree(base, repository / "snapshots" / ("1" * 40))
    (repository / "refs").mkdir()
    for name, number in (("main", "1"), ("v2", "2")):
        (repository / "refs" / name).write_text(number * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    trainer = HFTSFTTrainer(
        "org/model",
        args=SFTConfig(str(tmp_path / "2"), **QUIET, model_init_kwargs={"revision": "v2", "dtype": "auto"}),
        train_dataset=sft_dataset(tulu, "tulu"),
        processing_class=load_tokenizer(str(base)),
        hft_config=HFTConfig(reselect="same"),
    )
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.hft_selection.trainable == first.hft_selection.trainable
    assert trainer.hft_selection.start_model["name_or_path"] == "org/model@v2"
    assert set(start_files(trainer.model, trainer._revision).values()) == {small / "model.safetensors"}


def test_precomputed_reference_log_probs_train_like_a_live_reference(base, ultrafeedback, tmp_path):
    live = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path / "a")
    precomputed = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path / "b", precompute_ref_log_probs=True)
    for trainer in (live, precomputed):
        trainer.train()
    assert losses(live) == pytest.approx(losses(precomputed), abs=1e-5)


def test_the_mixin_gives_any_trl_trainer_a_half(base, ultrafeedback, tmp_path):
    rows = [
        {"prompt": row["chosen"][:-1], "completion": row[side][-1:], "label": side == "chosen"}
        for row in ultrafeedback
        for side in ("chosen", "rejected")
    ]
    trainer = HFTKTOTrainer(
        model=str(base),
        args=KTOConfig(str(tmp_path), **QUIET),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(str(base)),
        hft_config=HFTConfig(ratio=0.3),
    )
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())
    trainer.train()
    trainer.save_model()
    before, after = weights(base), weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in trainer.hft_selection.frozen)
    assert any(not torch.equal(before[name], after[name]) for name in trainer.hft_selection.trainable)


def test_a_frozen_half_that_moved_ends_in_an_error_and_is_not_saved(base, tulu, tmp_path):
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig())
    name = trainer.hft_selection.frozen[0]
    with torch.no_grad():
        trainer.model.get_parameter(name).view(-1)[0] += 1e-6
    with pytest.raises(RuntimeError, match=name):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(RuntimeError, match=name):
        trainer.train()


@pytest.mark.parametrize("change", ["type", "vocabulary"])
def test_a_model_that_changed_after_the_trainer_was_built_is_named_before_the_first_step(base, tulu, tmp_path, change):
    """Not only at the end, when the training is lost."""
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(train_embeddings=False))
    if change == "type":
        trainer.model.to(torch.bfloat16)
    else:
        trainer.model.resize_token_embeddings(len(trainer.processing_class) + 8)
    with pytest.raises(
        HFTError, match=r"frozen parameters, such as .*, were cast, resized or removed after the"
    ) as error:
        trainer.train()
    one_line(error)
    assert trainer.state.global_step == 0


def test_a_model_that_was_cast_after_training_is_not_saved_and_it_is_said(base, tulu, tmp_path):
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(), max_steps=1)
    trainer.train()
    trainer.model.to(torch.bfloat16)
    with pytest.raises(HFTError, match=r"was cast to torch\.bfloat16: save the model first, and cast what is saved"):
        trainer.save_model()


def test_a_frozen_half_under_other_names_is_still_checked_and_a_lost_one_is_an_error(base, tulu, tmp_path):
    """Checkpoint wrappers and torch.compile rename parameters; the check must not pass for want of names."""
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig())
    layers = trainer.model.model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    trainer.check_frozen()
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "_checkpoint_wrapped_module" in name and not parameter.requires_grad:
                parameter.add_(1)
    with pytest.raises(RuntimeError, match="moved"):
        trainer.check_frozen()
    del layers[0]
    with pytest.raises(RuntimeError, match=r"the frozen parameter .* (moved|was removed) during training"):
        trainer.check_frozen()


def test_a_dtype_that_rounds_the_start_model_is_refused(base, tulu, tmp_path):
    """The frozen half cannot keep bits that loading has rounded away; a wider type keeps every value."""
    narrow = {"model_init_kwargs": {"dtype": "bfloat16"}}
    with pytest.raises(HFTError, match=r"dtype bfloat16 rounds .* which is F32"):
        sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "a", HFTConfig(), **narrow)
    sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "b", HFTConfig(method="fft"), **narrow)
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "half")
    for settings in (narrow, {}):
        trainer = sft_trainer(HFTSFTTrainer, tmp_path / "half", tulu, tmp_path / "c", HFTConfig(), **settings)
        trainer.train()


class OwnSFTTrainer(SFTTrainer):
    """A user's subclass that hides its parent's signature."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class HFTOwnSFTTrainer(HFTMixin, OwnSFTTrainer):
    pass


def test_the_mixin_works_on_a_subclass_that_hides_its_signature(base, tulu, tmp_path):
    sft_trainer(HFTOwnSFTTrainer, base, tulu, tmp_path, HFTConfig()).train()
    with pytest.raises(HFTError, match="give an HFTConfig"):
        sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, {"ratio": 0.5})


def test_weight_decay_and_8_bit_adam_leave_the_frozen_half_alone(base, tulu, tmp_path):
    for number, settings in enumerate([{"weight_decay": 0.1}, {"optim": "adamw_bnb_8bit"}]):
        trainer = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / str(number), HFTConfig(), **settings)
        trainer.train()  # checks the frozen half itself
        before = weights(base)
        assert all(
            torch.equal(before[name], trainer.model.get_parameter(name)) for name in trainer.hft_selection.frozen
        )


def test_the_selection_lies_in_every_checkpoint_and_the_final_model(base, tulu, tmp_path):
    trainer = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, HFTConfig(), save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        content = json.loads((folder / "hft_selection.json").read_text())
        assert content["digest"] == trainer.hft_selection.digest
        assert content["start_model"]["name_or_path"] == str(base)
        assert len(content["start_model"]["weights_digest"]) == 64


def test_resuming_is_identical_to_not_having_stopped(base, tulu, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / "a", HFTConfig(), **settings)
    whole.train()
    whole.save_model()
    resumed = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / "b", HFTConfig(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    resumed.save_model()
    a, b = tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors"
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("step", [2, 4])
def test_resuming_ends_in_the_same_bits_wherever_it_starts(base, tulu, tmp_path, step):
    """Also from the checkpoint of the last step, after which stock transformers would train one step more."""
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / "a", HFTConfig(), **settings)
    whole.train()
    whole.save_model()
    resumed = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / "b", HFTConfig(), **settings)
    resumed.train(resume_from_checkpoint=tmp_path / "a" / f"checkpoint-{step}")
    resumed.save_model()
    assert resumed.state.global_step == 4
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_finished_run_goes_on_when_more_epochs_are_asked_for(base, tulu, tmp_path):
    settings = {"save_strategy": "epoch", "max_steps": -1}
    first = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, HFTConfig(), num_train_epochs=1, **settings)
    first.train()
    more = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, HFTConfig(), num_train_epochs=2, **settings)
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step == 2 * first.state.global_step


def test_resuming_with_another_selection_is_refused_with_both_digests_and_the_difference(base, tulu, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    first = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, HFTConfig(), **settings)
    first.train()
    other = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, HFTConfig(ratio=0.25, seed=1), **settings)
    with pytest.raises(HFTError) as error:
        other.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    with pytest.raises(HFTError, match="was trained with selection"):
        other.train(resume_from_checkpoint=True)
    message = str(error.value)
    assert first.hft_selection.digest[:16] in message
    assert other.hft_selection.digest[:16] in message
    assert "ratio 0.5 there, 0.25 here" in message
    assert "seed 42 there, 1 here" in message


@pytest.mark.parametrize("method", ["hft", "fft"])
def test_resuming_from_a_folder_that_does_not_exist_says_so(base, tulu, tmp_path, method):
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(method=method))
    with pytest.raises(HFTError, match="checkpoint-3', which is not a folder"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-3")


def test_resuming_from_another_start_model_is_refused(base, tulu, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / "a", HFTConfig(), **settings).train()
    other = tmp_path / "other"
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    tiny_llama(len(AutoTokenizer.from_pretrained(base)), rms_norm_eps=1e-5).save_pretrained(other)
    changed = {name: tensor + 0.01 for name, tensor in weights(other).items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    trainer = sft_trainer(ResumableSFTTrainer, other, tulu, tmp_path / "a", HFTConfig(), **settings)
    with pytest.raises(HFTError, match="was started from"):
        trainer.train(resume_from_checkpoint=True)


def test_the_model_card_names_method_shares_digest_start_and_citation(base, tulu, tmp_path):
    trainer = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, HFTConfig(), save_strategy="steps", save_steps=4)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    for words in (
        "Half Fine-Tuning",
        trainer.hft_selection.digest,
        str(base),
        "attention | 0.5000",
        "2404.18466",
        "- hft",
    ):
        assert words in card


@pytest.mark.parametrize("method", ["hft", "fft"])
def test_the_model_card_names_what_the_user_gave_and_links_only_the_hub(base, tulu, tmp_path, method):
    """TRL's would be of None, and a link to a local path."""
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "out", HFTConfig(method=method))
    (tmp_path / "rows.jsonl").write_text("")
    for names, text, hub in (
        (str(tmp_path / "rows.jsonl"), f"`{tmp_path / 'rows.jsonl'}`", None),
        (
            ["org/set", str(demo.SFT_DATA)],
            "[org/set](https://huggingface.co/datasets/org/set) and `demo`",
            ["org/set"],
        ),
    ):
        trainer.create_model_card(dataset_name=names)
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert f"fine-tuned version of `{base}` on {text}.\n" in card.text
        assert card.data.datasets == hub
        assert "# Model Card for out\n" in card.text
        assert "None" not in card.content
        assert f"huggingface.co/{base}" not in card.content
    trainer.create_model_card()
    assert f"fine-tuned version of `{base}`.\n" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_of_a_model_that_has_no_path_says_so(base, tokenizer, tulu, tmp_path):
    model = tiny_llama(len(tokenizer))
    rows, args = sft_dataset(tulu, "tulu"), SFTConfig(str(tmp_path), **QUIET)
    given = {"train_dataset": rows, "processing_class": load_tokenizer(str(base))}
    HFTSFTTrainer(model, args, **given).create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "fine-tuned version of a model in memory." in text
    assert "the bits of the start model\n`in memory` (weights `" in text


def test_a_model_on_the_hub_is_linked_in_the_card(base, tulu, tmp_path):
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "out", HFTConfig())
    start = {"name_or_path": "org/base", "weights_digest": "0"}
    trainer.model.config._name_or_path = "org/base"
    trainer.hft_selection = dataclasses.replace(trainer.hft_selection, start_model=start)
    trainer.create_model_card("mine", "org/set")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    sentence = "of [org/base](https://huggingface.co/org/base) on [org/set](https://huggingface.co/datasets/org/set)."
    assert sentence in card.text
    assert card.data.base_model == "org/base"
    assert "# Model Card for mine" in card.text


def test_adapters_and_quantized_models_are_refused(base, tulu, tmp_path):
    args = SFTConfig(str(tmp_path), **QUIET)
    for extra in ({"peft_config": LoraConfig()}, {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}):
        with pytest.raises(HFTError, match=next(iter(extra))):
            ResumableSFTTrainer(model=str(base), args=args, train_dataset=tulu, hft_config=HFTConfig(), **extra)


def test_an_optimizer_that_holds_other_parameters_than_those_that_learn_is_refused(base, tulu, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    everything = torch.optim.AdamW(model.parameters(), lr=1e-3)
    common = {
        "model": model,
        "args": SFTConfig(str(tmp_path), **QUIET),
        "train_dataset": sft_dataset(tulu, "tulu"),
        "processing_class": load_tokenizer(str(base)),
        "hft_config": HFTConfig(),
    }
    with pytest.raises(HFTError, match="optimizers holds"):
        ResumableSFTTrainer(**common, optimizers=(everything, None))
    head = torch.optim.AdamW(model.lm_head.parameters(), lr=1e-3)
    with pytest.raises(HFTError, match=r"optimizers lacks 20 .* such as model\.embed_tokens"):
        ResumableSFTTrainer(**common, optimizers=(head, None))
    chosen = set(select(model, HFTConfig()).trainable)
    half = torch.optim.AdamW([p for name, p in model.named_parameters() if name in chosen], lr=1e-3)
    ResumableSFTTrainer(**common, optimizers=(half, None)).train()
    # The next stage of this model draws another half
    with pytest.raises(HFTError, match=r"optimizers holds .* set trainer\.optimizer\."):
        ResumableSFTTrainer(**common, optimizers=(half, None))
    trainer = ResumableSFTTrainer(**common)
    learn = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer.optimizer = torch.optim.SGD(learn, lr=0.1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(trainer.hft_selection.trainable)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)


@pytest.mark.parametrize("method", ["hft", "fft"])
def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_last_good_checkpoint(base, tulu, tmp_path, method):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    trainer = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, HFTConfig(method=method), **settings)
    compute = trainer.compute_loss

    def breaks_at_the_third_step(*args, **kwargs):
        return compute(*args, **kwargs) * (float("nan") if trainer.state.global_step == 2 else 1.0)

    trainer.compute_loss = breaks_at_the_third_step
    with pytest.raises(HFTError) as error:
        trainer.train()
    assert "loss is nan at step 3" in str(error.value)
    assert str(tmp_path / "checkpoint-2") in str(error.value)
    assert not (tmp_path / "checkpoint-3").exists()


def test_the_same_seed_gives_the_same_bits(base, tulu, tmp_path):
    for folder in ("a", "b"):
        trainer = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / folder, HFTConfig(seed=9))
        trainer.train()
        trainer.save_model()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_frozen_parameter_that_is_made_trainable_again_is_named_when_training_begins(base, tulu, tmp_path):
    """Not only at the end, when the training is lost."""
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path)
    name = next(name for name, p in trainer.model.named_parameters() if not p.requires_grad)
    trainer.model.get_parameter(name).requires_grad_(True)
    with pytest.raises(HFTError, match=f"1 frozen parameters, such as {name}, require gradients again"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_parameter_that_was_frozen_later_is_named_when_training_begins(base, tulu, tmp_path):
    """It would be recorded as trained. Another trainer of the same model freezes its own half, too."""
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path)
    trainer.model.lm_head.requires_grad_(False)
    with pytest.raises(HFTError, match=r"1 parameters .* such as lm_head\.weight, were frozen") as error:
        trainer.train()
    one_line(error)
    assert trainer.state.global_step == 0


def test_an_average_of_all_parameters_is_rejected_before_the_first_step(base, tulu, tmp_path):
    """TRL's callback fails at its first update, after 400 steps by default, where parameters are frozen."""
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path)
    trainer.add_callback(BEMACallback())
    with pytest.raises(HFTError, match=r"BEMACallback takes .*: remove the callback, or set") as error:
        trainer.train()
    one_line(error)
    assert trainer.state.global_step == 0


def test_a_callback_that_would_write_into_a_shared_reference_is_rejected_before_the_first_step(
    base, ultrafeedback, tmp_path
):
    """Its rounding would move the policy's frozen half. With `sync_ref_model` nothing is shared."""
    trainer = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path, ref_model_sync_steps=1)
    trainer.add_callback(SyncRefModelCallback(trainer.ref_model, trainer.accelerator))
    with pytest.raises(HFTError, match=r"SyncRefModelCallback would .*: set sync_ref_model to true instead") as error:
        trainer.train()
    one_line(error)
    assert trainer.state.global_step == 0
