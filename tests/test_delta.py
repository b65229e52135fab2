"""Delta checkpoints: half the bytes, and the same bits after resuming, restoring and choosing the best."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import tiny_llama
from safetensors.torch import load_file, save_file
from test_trainers import dpo_trainer, sft_trainer, weights
from transformers import AutoModelForCausalLM
from trl import SFTConfig
from typer.testing import CliRunner

from hft_trl import HFTConfig, HFTDPOTrainer, HFTError, HFTSFTTrainer, delta, select
from hft_trl.checkpoints import last_finite_checkpoint, last_whole_checkpoint, torn_because
from hft_trl.cli import app
from hft_trl.rows import sft_dataset

ROOT = Path(__file__).parent.parent
EVERY_2 = {"save_strategy": "steps", "save_steps": 2}
DELTA = HFTConfig(delta_checkpoints=True)


@pytest.fixture(scope="module")
def trained(base, tulu, tmp_path_factory):
    """One run with delta checkpoints and one with whole ones, in one go each."""
    folder = tmp_path_factory.mktemp("delta")
    for name, hft in (("delta", DELTA), ("whole", HFTConfig())):
        trainer = sft_trainer(HFTSFTTrainer, base, tulu, folder / name, hft, **EVERY_2)
        trainer.train()
        trainer.save_model()
    return folder


def model_bytes(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def test_a_delta_checkpoint_holds_the_trainable_parameters_and_the_final_model_is_whole(base, trained):
    checkpoint = trained / "delta" / "checkpoint-2"
    trainable = set(select(AutoModelForCausalLM.from_pretrained(base), DELTA).trainable)
    held, whole = load_file(checkpoint / delta.DELTA_FILE), weights(trained / "whole" / "checkpoint-2")
    assert held.keys() == trainable < whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in held.items())
    assert not (checkpoint / "model.safetensors").exists()
    assert not list((trained / "delta").glob("hft_delta*"))
    assert model_bytes(trained / "delta") == model_bytes(trained / "whole")


def test_a_delta_checkpoint_takes_half_the_bytes(tokenizer, tulu, tmp_path):
    """Weights and optimizer of a model that is mostly layers, against full fine-tuning."""
    base = tmp_path / "base"
    tiny_llama(len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=8).save_pretrained(base)
    tokenizer.save_pretrained(base)
    sizes = {}
    for name, hft in (("fft", HFTConfig(method="fft")), ("hft", HFTConfig()), ("delta", DELTA)):
        settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
        sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / name, hft, **settings).train()
        files = (tmp_path / name / "checkpoint-1").iterdir()
        sizes[name] = sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".pt"))
    assert sizes["delta"] < 0.6 * sizes["fft"]
    assert sizes["delta"] < 0.85 * sizes["hft"]


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("then", [True, False])
def test_resuming_from_a_delta_checkpoint_ends_in_the_same_bits(base, tulu, trained, tmp_path, step, then):
    """Also from the last step, and with whole checkpoints from then on."""
    hft = HFTConfig(delta_checkpoints=then)
    resumed = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, hft, **EVERY_2)
    resumed.train(resume_from_checkpoint=trained / "delta" / f"checkpoint-{step}")
    resumed.save_model()
    assert resumed.state.global_step == 4
    assert model_bytes(tmp_path) == model_bytes(trained / "whole")


def test_a_run_with_whole_checkpoints_goes_on_with_delta_ones(base, tulu, trained, tmp_path):
    resumed = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, DELTA, **EVERY_2)
    resumed.train(resume_from_checkpoint=trained / "whole" / "checkpoint-2")
    resumed.save_model()
    assert delta.is_delta(tmp_path / "checkpoint-4")
    assert model_bytes(tmp_path) == model_bytes(trained / "whole")


def test_dpo_resumes_from_a_delta_checkpoint_to_the_same_bits(base, ultrafeedback, tmp_path):
    """The reference stays the start model: it is never loaded from the checkpoint."""
    whole = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path / "a", DELTA, **EVERY_2)
    resumed = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path / "b", DELTA, **EVERY_2)
    whole.train()
    resumed.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    for trainer in (whole, resumed):
        trainer.save_model()
    assert model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b")


def test_a_tied_head_is_stored_once(tokenizer, tulu, tmp_path):
    base = tmp_path / "base"
    tiny_llama(len(tokenizer), tie_word_embeddings=True).save_pretrained(base)
    tokenizer.save_pretrained(base)
    first = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "a", DELTA, **EVERY_2)
    first.train()
    first.save_model()
    assert "lm_head.weight" not in load_file(tmp_path / "a" / "checkpoint-2" / delta.DELTA_FILE)
    resumed = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / "b", DELTA, **EVERY_2)
    resumed.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    resumed.save_model()
    assert model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b")


def test_buffers_that_a_model_saves_are_kept(base, trained, tmp_path):
    model, other = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    for number, one in enumerate((model, other)):
        one.register_buffer("seen", torch.tensor([7.0 * (1 - number)]))
    start = {"name_or_path": str(base), "weights_digest": "0" * 64}
    selection = dataclasses.replace(select(model, DELTA), start_model=start)
    delta.save(model, None, selection, tmp_path)
    delta.load(other, tmp_path)
    assert other.seen.item() == 7.0


def test_the_best_model_is_loaded_from_its_delta_checkpoint(base, tulu, tmp_path):
    """The highest loss counts as the best here, so the best model is the first one and has to be loaded."""
    settings = {
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True,
    }  # fmt: skip
    with_evaluation = partial(HFTSFTTrainer, eval_dataset=sft_dataset(tulu, "tulu"))
    for name, hft in (("delta", DELTA), ("whole", HFTConfig())):
        trainer = sft_trainer(with_evaluation, base, tulu, tmp_path / name, hft, **settings)
        trainer.train()
        trainer.save_model()
        assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    assert model_bytes(tmp_path / "delta") == model_bytes(tmp_path / "whole" / "checkpoint-1")
    assert model_bytes(tmp_path / "whole") == model_bytes(tmp_path / "whole" / "checkpoint-1")


def test_another_start_model_is_refused(base, tulu, trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    changed = weights(other)
    frozen = select(AutoModelForCausalLM.from_pretrained(base), DELTA).frozen[0]
    changed[frozen].view(-1)[0] += 1e-3
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    trainer = sft_trainer(HFTSFTTrainer, other, tulu, tmp_path / "out", DELTA, **EVERY_2)
    with pytest.raises(HFTError, match="was started from"):
        trainer.train(resume_from_checkpoint=trained / "delta" / "checkpoint-2")
    with pytest.raises(HFTError, match="give the model that training started from"):
        delta.restore(trained / "delta" / "checkpoint-2", tmp_path / "whole", str(other))
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("kept", [0, 100, -3])
def test_a_delta_checkpoint_cut_short_is_torn_and_passed_over(trained, tmp_path, kept):
    output = tmp_path / "run"
    shutil.copytree(trained / "delta", output)
    path = output / "checkpoint-4" / delta.DELTA_FILE
    path.write_bytes(path.read_bytes()[:kept])
    assert delta.DELTA_FILE in torn_because(path.parent)
    assert last_whole_checkpoint(output) == last_finite_checkpoint(output) == str(output / "checkpoint-2")
    path.unlink()
    assert torn_because(path.parent)


def test_a_delta_checkpoint_that_is_not_finite_is_no_good_one(trained, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained / "delta", output)
    path = output / "checkpoint-4" / delta.DELTA_FILE
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path)
    assert last_finite_checkpoint(output) == str(output / "checkpoint-2")


def test_a_delta_checkpoint_is_no_model_and_says_how_to_make_one(trained, tmp_path):
    checkpoint = trained / "delta" / "checkpoint-4"
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    assert "hft-trl restore checkpoint-4" in (checkpoint / "README.md").read_text()
    result = CliRunner().invoke(app, ["restore", str(checkpoint), str(tmp_path / "whole")])
    assert result.exit_code == 0, result.output
    for name in (
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    ):
        assert (tmp_path / "whole" / name).read_bytes() == (trained / "whole" / name).read_bytes(), name
    for name in ("whole", "missing"):
        with pytest.raises(HFTError, match=r"has no hft_delta\.safetensors"):
            delta.restore(trained / name / "checkpoint-4", tmp_path / "never")


def test_a_delta_checkpoint_of_another_model_is_refused(trained, tokenizer):
    other = tiny_llama(len(tokenizer), hidden_size=64)
    with pytest.raises(HFTError, match="which the model has not"):
        delta.load(other, trained / "delta" / "checkpoint-2")


def test_full_fine_tuning_keeps_whole_checkpoints(base, tulu, tmp_path):
    hft = HFTConfig(method="fft", delta_checkpoints=True)
    sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, hft, **{**EVERY_2, "max_steps": 2}).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    assert not delta.is_delta(tmp_path / "checkpoint-2")


class State:
    """An accelerator's state, as far as it matters here."""

    def __init__(self, distributed_type):
        self.distributed_type = distributed_type


@pytest.mark.parametrize("backend", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_backends_that_write_whole_checkpoints_are_refused(tmp_path, backend):
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(HFTError, match=backend.value):
        delta.wanted(DELTA, args, State(backend))
    assert not delta.wanted(HFTConfig(), args, State(backend))
    assert delta.wanted(DELTA, args, State(DistributedType.MULTI_GPU))


def test_pushing_checkpoints_that_are_no_models_is_refused(tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, push_to_hub=True)
    with pytest.raises(HFTError, match="hub_strategy 'every_save'"):
        delta.wanted(DELTA, args, State(DistributedType.NO))
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, push_to_hub=True, hub_strategy="end")
    assert delta.wanted(DELTA, args, State(DistributedType.NO))


@pytest.mark.e2e
def test_two_processes_resume_from_delta_checkpoints_to_the_same_bits(tmp_path):
    """DDP over gloo: the run in one go and the one that went on from step 2 end in equal files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    command = [
        *launch, "recipes/sft.py", "--model_name_or_path", "demo", "--dataset_name", "demo", "--max_steps", "4",
        "--save_steps", "2", "--max_length", "96", "--report_to", "none", "--delta_checkpoints", "true",
        "--gradient_checkpointing", "false", "--output_dir",
    ]  # fmt: skip
    for attempt in ("whole", "resumed"):
        output = tmp_path / attempt
        if attempt == "resumed":  # as if it had been killed after step 2
            shutil.copytree(tmp_path / "whole", output, ignore=shutil.ignore_patterns("checkpoint-4", "model*"))
            stage = json.loads((output / "stage.json").read_text())
            (output / "stage.json").write_text(json.dumps({**stage, "record": None}))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [*command, str(output)],
            cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=environment,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        report = json.loads((output / "report.json").read_text())
        assert report["num_processes"] == 2
        assert report["stages"][0]["resumed_from_step"] == (2 if attempt == "resumed" else None)
        assert delta.is_delta(output / "checkpoint-4")
    assert model_bytes(tmp_path / "whole") == model_bytes(tmp_path / "resumed")


@pytest.mark.parametrize("share", [True, False])
def test_a_frozen_half_in_bfloat16_and_a_shared_reference_change_nothing(base, ultrafeedback, tmp_path, share):
    """The checkpoint holds trained parameters only, in full precision, so the rest may be stored in any way."""
    hft = HFTConfig(delta_checkpoints=True, frozen_dtype="bfloat16", share_reference=share)
    settings = {**EVERY_2, "bf16": True}
    whole = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path / "a", hft, **settings)
    resumed = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path / "b", hft, **settings)
    whole.train()
    resumed.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    for trainer in (whole, resumed):
        trainer.save_model()
    delta.restore(tmp_path / "a" / "checkpoint-4", tmp_path / "restored")
    assert model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b") == model_bytes(tmp_path / "restored")
