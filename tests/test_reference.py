"""The reference: the policy before its first step, its frozen half stored once, or quantized."""

import copy
import functools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, tiny_llama
from datasets import Dataset
from training import QUIET, HFTKTOTrainer, dpo_trainer, losses, weights
from transformers import AutoModelForCausalLM
from trl import DPOConfig, KTOConfig

from hft_trl import HFTConfig, HFTDPOTrainer, HFTError
from hft_trl.chat import load_tokenizer
from hft_trl.recipe.rows import preference_dataset
from hft_trl.reference import copied, memory

OFF = HFTConfig(share_reference=False)


def test_the_frozen_half_of_policy_and_reference_is_stored_once(base, ultrafeedback, tmp_path, capsys):
    trainer = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path)
    for when in ("before", "after"):
        policy, theirs = dict(trainer.model.named_parameters()), dict(trainer.ref_model.named_parameters())
        assert policy.keys() == theirs.keys()
        for name, parameter in policy.items():
            assert (parameter.data_ptr() == theirs[name].data_ptr()) == (name in trainer.hft_selection.frozen), (
                when,
                name,
            )
        frozen = sum(policy[name].nbytes for name in trainer.hft_selection.frozen)
        total = sum(parameter.nbytes for parameter in policy.values())
        assert memory(trainer.model, trainer.ref_model) == (total - frozen, frozen)
        if when == "before":
            assert f"reference: shares {frozen:,} of {total:,} bytes with the policy." in capsys.readouterr().out
            trainer.train()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_weights_are_those_of_an_unshared_run_to_the_last_bit(
    base, ultrafeedback, tmp_path, bf16, checkpointing
):
    runs = []
    for name, hft in (("shared", HFTConfig()), ("unshared", OFF)):
        trainer = dpo_trainer(
            HFTDPOTrainer, base, ultrafeedback, tmp_path / name, hft, bf16=bf16, gradient_checkpointing=checkpointing
        )
        trainer.train()
        trainer.save_model()
        runs.append([row for row in trainer.state.log_history if "loss" in row])
    same = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected")
    assert [[row[key] for key in same] for row in runs[0]] == [[row[key] for key in same] for row in runs[1]]
    a, b = tmp_path / "shared", tmp_path / "unshared"
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_two_processes_share_too_and_lose_no_bit(base, tmp_path):
    """
    DDP on CPU copies the policy when it wraps it, which must not undo the sharing; in bfloat16, NF4 and resumed as
    well.
    """
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "ddp_halves.py"]
    result = subprocess.run(
        [*command, str(base), str(tmp_path / "out")],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    before = weights(base)
    for process in (0, 1):
        found = json.loads((tmp_path / "out" / f"{process}.json").read_text())
        for kind, size in (("", 4), (" in bfloat16", 2)):
            shared, unshared = found["shared" + kind], found["unshared" + kind]
            assert shared["processes"] == 2
            assert shared["losses"] == unshared["losses"]
            assert shared["losses"][0] == pytest.approx(0.693147, abs=1e-5)
            numbers = sum(before[name].numel() for name in shared["frozen"])
            total = sum(tensor.numel() for tensor in before.values())
            held = sum(before[name].numel() * (4 if "norm" in name else size) for name in shared["frozen"])
            assert shared["memory"] == [4 * (total - numbers), held]
            assert unshared["memory"] == [4 * (total - numbers) + held, 0]
        small = found["shared in nf4"]
        assert small["losses"][0] == pytest.approx(0.693147, abs=1e-5)
        assert small["memory"][0] == 4 * (total - numbers)
        assert small["memory"][1] < numbers
    for kind in ("", " in bfloat16"):
        files = [tmp_path / "out" / (name + kind) for name in ("shared", "unshared")]
        files.append(files[0] / "again")
        assert len({(folder / "model.safetensors").read_bytes() for folder in files}) == 1
        after = weights(files[0])
        assert all(torch.equal(before[name], after[name]) for name in shared["frozen"])
    files = [tmp_path / "out" / "shared in nf4", tmp_path / "out" / "shared in nf4" / "again"]
    assert len({(folder / "model.safetensors").read_bytes() for folder in files}) == 1
    after = weights(files[0])
    assert all(torch.equal(before[name], after[name]) for name in shared["frozen"])


def test_no_two_whole_models_are_held_at_start(tmp_path, base, tokenizer):
    """The peak of building the trainer is the policy and the trained half of the reference."""
    big = tmp_path / "big"
    model = tiny_llama(len(tokenizer), hidden_size=768, intermediate_size=2048, num_hidden_layers=2)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(big)
    tokenizer.save_pretrained(big)
    result = subprocess.run(
        [sys.executable, "peak_at_start.py", str(base), str(big)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    shared, unshared = (int(word) / size for word in result.stdout.split()[-2:])
    assert 1.4 < shared < 1.7
    assert unshared > 1.9


def test_resuming_and_going_back_to_the_best_leave_the_reference_alone(base, ultrafeedback, tmp_path):
    settings = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True,
    }  # fmt: skip
    models = []
    for name, hft, checkpoint in (
        ("a", HFTConfig(), None),
        ("b", HFTConfig(), "checkpoint-4"),
        ("c", OFF, None),
    ):
        trainer = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path / name, hft, eval_rows=8, **settings)
        trainer.train(resume_from_checkpoint=tmp_path / "a" / checkpoint if checkpoint else None)
        start, policy = weights(base), dict(trainer.model.named_parameters())
        for key, parameter in trainer.ref_model.named_parameters():
            assert torch.equal(parameter, start[key]), key
            assert (parameter.data_ptr() == policy[key].data_ptr()) == (
                hft.share_reference and key in trainer.hft_selection.frozen
            )
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
        trainer.save_model()
        models.append((tmp_path / name / "model.safetensors").read_bytes())
    assert models[0] == models[1] == models[2] == (tmp_path / "a" / "checkpoint-2" / "model.safetensors").read_bytes()


def test_a_policy_changed_in_memory_is_its_own_reference(base, tokenizer, ultrafeedback, tmp_path):
    """
    The reference is the policy before its first step, wherever that came from.

    An unshared one comes from the path.
    """
    changed = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(HFTError, match=r"changed in memory .*model\.layers\.1\.mlp\.up_proj\.weight"):
        dpo_trainer(HFTDPOTrainer, copy.deepcopy(changed), ultrafeedback, tmp_path, OFF)
    policy = copy.deepcopy(changed)
    start = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    trainer = dpo_trainer(HFTDPOTrainer, policy, ultrafeedback, tmp_path)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    assert all(torch.equal(parameter, start[name]) for name, parameter in trainer.ref_model.named_parameters())
    with pytest.raises(HFTError, match="changed in memory"):  # the trainer has put a forward in place of the model's
        dpo_trainer(HFTDPOTrainer, trainer.model, ultrafeedback, tmp_path)


def test_a_policy_without_a_path_needs_no_path_for_a_shared_reference(base, tokenizer, ultrafeedback, tmp_path):
    common = {
        "args": DPOConfig(str(tmp_path), **QUIET),
        "train_dataset": preference_dataset(ultrafeedback, "prefs"),
        "processing_class": load_tokenizer(str(base)),
    }
    with pytest.raises(HFTError, match="without a path"):
        HFTDPOTrainer(model=tiny_llama(len(tokenizer)), hft_config=OFF, **common)
    with pytest.raises(HFTError, match="without a path"):
        HFTDPOTrainer(model=tiny_llama(len(tokenizer)), hft_config=HFTConfig(method="fft"), **common)
    trainer = HFTDPOTrainer(model=tiny_llama(len(tokenizer)), **common)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)


def test_tied_embeddings_stay_tied_in_the_reference(tokenizer, base, ultrafeedback, tmp_path):
    model = tiny_llama(len(tokenizer), tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    runs = []
    for hft in (HFTConfig(), OFF, HFTConfig(train_lm_head=False)):
        trainer = dpo_trainer(HFTDPOTrainer, tmp_path / "tied", ultrafeedback, tmp_path / "out", hft)
        own = trainer.ref_model
        assert own.lm_head.weight is own.model.embed_tokens.weight
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]
    assert own.lm_head.weight.data_ptr() == trainer.model.lm_head.weight.data_ptr()


@pytest.mark.parametrize(
    ("settings", "hft", "reason"),
    [
        ({"sync_ref_model": True, "ref_model_sync_steps": 1}, HFTConfig(), "sync_ref_model moves the reference"),
        ({}, OFF, "hft.share_reference is false"),
        ({"given": True}, HFTConfig(), "ref_model was passed"),
    ],
)
def test_where_nothing_is_shared_the_log_says_why(base, ultrafeedback, tmp_path, capsys, settings, hft, reason):
    settings = dict(settings)
    given = AutoModelForCausalLM.from_pretrained(base) if settings.pop("given", False) else None
    trainer = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path, hft, ref_model=given, **settings)
    assert f"not shared because {reason}" in capsys.readouterr().out
    assert memory(trainer.model, trainer.ref_model)[1] == 0
    trainer.train()
    trainer.check_frozen()


def test_a_trainer_that_loads_its_own_reference_shares_it_when_it_is_equal(base, ultrafeedback, tmp_path):
    rows = [
        {"prompt": row["chosen"][:-1], "completion": row[side][-1:], "label": side == "chosen"}
        for row in ultrafeedback
        for side in ("chosen", "rejected")
    ]
    runs = []
    for hft in (HFTConfig(), OFF):
        trainer = HFTKTOTrainer(
            model=str(base),
            args=KTOConfig(str(tmp_path), **QUIET),
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(str(base)),
            hft_config=hft,
        )
        trainer.train()
        frozen = sum(trainer.model.get_parameter(name).nbytes for name in trainer.hft_selection.frozen)
        assert memory(trainer.model, trainer.ref_model)[1] == (frozen if hft.share_reference else 0)
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


def test_the_users_arguments_come_back_as_they_were(base, ultrafeedback, tmp_path, caplog, monkeypatch):
    """model_init_kwargs are used for the policy, without TRL's warning that they are ignored."""
    monkeypatch.setattr(logging.getLogger("trl"), "propagate", True)
    kwargs = {"dtype": "float32", "attn_implementation": "eager"}
    trainer = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path, model_init_kwargs=kwargs)
    assert trainer.args.model_init_kwargs == kwargs
    assert trainer.model.config._attn_implementation == trainer.ref_model.config._attn_implementation == "eager"
    assert "ignored" not in caplog.text
    trainer.save_model()  # with a tokenizer that has a template
    rows = preference_dataset(ultrafeedback, "prefs")
    trainer = HFTDPOTrainer(str(tmp_path), None, DPOConfig(str(tmp_path), **QUIET), None, rows)
    assert trainer.processing_class.chat_template
    assert memory(trainer.model, trainer.ref_model)[1] > 0


def test_copies_of_a_policy_take_no_memory(tokenizer):
    policy = tiny_llama(len(tokenizer), tie_word_embeddings=True)
    hollow, alias = copied(policy, hollow=True), copied(policy, hollow=False)
    assert all(parameter.numel() == 0 for parameter in hollow.parameters())
    assert memory(policy, alias)[0] == 0
    ids = torch.arange(8)[None]
    assert torch.equal(alias(ids).logits, policy(ids).logits)
    assert alias.lm_head.weight is alias.model.embed_tokens.weight
    assert alias.lm_head.weight is not policy.lm_head.weight
    assert not any(parameter.requires_grad for copy in (hollow, alias) for parameter in copy.parameters())


def test_a_policy_that_can_not_be_copied_is_said_to_be_loaded_twice(base, ultrafeedback, tmp_path, caplog):
    """Two whole models at start are never held in silence."""
    policy = AutoModelForCausalLM.from_pretrained(base)
    layer = policy.model.layers[0]
    layer.forward = functools.partial(type(layer).forward, layer)
    logging.getLogger("transformers").addHandler(caplog.handler)
    trainer = dpo_trainer(HFTDPOTrainer, policy, ultrafeedback, tmp_path)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    size = sum(parameter.nbytes for parameter in policy.parameters())
    assert "a forward of its own" in caplog.text
    assert f"{size:,} bytes more at start" in caplog.text
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
