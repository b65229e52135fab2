"""Gradient norms: of the trainer's own loss, nothing left behind, the same in all processes, once for a run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, QUIET
from datasets import Dataset
from training import ResumableSFTTrainer, dpo_trainer, losses, sft_trainer, weights
from transformers import AutoModelForCausalLM
from trl import GRPOConfig
from trl.experimental.cpo import CPOConfig, CPOTrainer

from hft_trl import HFTConfig, HFTDPOTrainer, HFTError, HFTMixin, HFTSFTTrainer, Selection
from hft_trl.chat import load_tokenizer
from hft_trl.retention.meter import Meter
from hft_trl.trainers import calibration
from hft_trl.trainers.calibration import FILE, drawn_rows, gradient_squares, output_squares
from hft_trl.trainers.compatibility import check

GRADIENT = HFTConfig(strategy="importance", importance="gradient_norm", calibration_samples=3)
TWO_ROWS = HFTConfig(strategy="importance", importance="gradient_norm", calibration_samples=2)
WANDA = HFTConfig(strategy="importance", importance="wanda", importance_order="least", source_texts="demo")
NAMES = ["model.layers.0.mlp.up_proj.weight", "model.layers.3.self_attn.q_proj.weight"]


def test_it_is_the_squared_gradient_of_each_rows_loss_over_the_answers_tokens(base, tulu, tmp_path):
    trainer = sft_trainer(HFTSFTTrainer, base, tulu.select(range(3)), tmp_path, HFTConfig(method="fft"))
    found = gradient_squares(trainer, trainer.model, NAMES, drawn_rows(trainer, GRADIENT))
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = dict.fromkeys(NAMES, 0.0)
    for row in trainer.train_dataset:
        tokens = torch.tensor([row["input_ids"]])
        model(tokens, labels=torch.tensor([row["labels"]])).loss.backward()
        for name in NAMES:
            expected[name] += model.get_parameter(name).grad.double().square().sum().item() / 3
        model.zero_grad()
    assert found == pytest.approx(expected, rel=1e-4)


def test_wanda_is_each_weight_times_its_input_over_the_sources_tokens(base, tulu, tmp_path):
    """For a linear layer. What is no linear layer counts with its own elements."""
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(method="fft"))
    model, norm = trainer.model, "model.layers.3.input_layernorm.weight"
    blocks = Meter(trainer.processing_class, texts=["Ada lives in Rome.", "Where does Ada live?"]).texts
    found = output_squares(model, [*NAMES, norm], blocks)
    layer, seen = model.model.layers[3], []
    layer.input_layernorm.register_forward_hook(lambda _, __, output: seen.append(output.squeeze(0)))
    with torch.no_grad():
        for ids in blocks:
            model(torch.tensor([ids]))
    weight = layer.self_attn.q_proj.weight.detach()
    products = torch.cat(seen)[:, None, :] * weight[None]  # tokens, outputs, inputs
    assert found[NAMES[1]] == pytest.approx(products.double().square().sum().item() / sum(map(len, blocks)), rel=1e-4)
    assert found[norm] == pytest.approx(layer.input_layernorm.weight.numel())  # of ones
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_wanda_goes_by_the_given_text_and_says_when_there_is_none(base, tulu, tmp_path):
    halves = []
    for name, text in (("a", "Ada lives in Rome. " * 20), ("b", "zzz qqq 0123456789 " * 20)):
        (tmp_path / name).write_text(text)
        hft = replace(WANDA, source_texts=str(tmp_path / name))
        halves.append(sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / f"out{name}", hft).hft_selection)
    assert halves[0].share == halves[1].share
    assert halves[0].trainable != halves[1].trainable
    assert "source_texts" not in halves[0].config.selecting()  # a path, which another machine may not have
    with pytest.raises(HFTError, match=r"hft\.source_texts is missing: give a text file"):
        sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, replace(WANDA, source_texts=None))
    with pytest.raises(HFTError, match="cannot be read"):
        sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, replace(WANDA, source_texts=str(tmp_path / "none.txt")))


@pytest.mark.parametrize(("kind", "measured"), [("sft", GRADIENT), ("dpo", GRADIENT), ("sft", WANDA)])
def test_nothing_is_left_behind_in_the_trainer_the_model_and_random_states(
    base, tulu, ultrafeedback, tmp_path, kind, measured
):
    """Training with a half that was measured is, step by step, training with the same half given."""
    runs = []
    for number, hft in enumerate((measured, None)):
        start = base
        if hft is None:  # the same half, taken over from the start model's folder
            start = tmp_path / "start"
            start.mkdir()
            for file in base.iterdir():
                (start / file.name).write_bytes(file.read_bytes())
            Selection.load(tmp_path / "0").save(start)
            hft = HFTConfig(reselect="same")
        torch.manual_seed(5)
        make, trainer_class, rows = (
            (sft_trainer, HFTSFTTrainer, tulu) if kind == "sft" else (dpo_trainer, HFTDPOTrainer, ultrafeedback)
        )
        trainer = make(trainer_class, start, rows, tmp_path / str(number), hft)
        state = torch.get_rng_state()
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
        assert trainer.optimizer is None
        assert not any(trainer._metrics.values())
        training = trainer.model.training
        trainer.train()
        trainer.save_model()
        runs.append((losses(trainer), state.tolist(), training, trainer.hft_selection.trainable))
    assert runs[0] == runs[1]
    assert (tmp_path / "0/model.safetensors").read_bytes() == (tmp_path / "1/model.safetensors").read_bytes()


def test_the_metrics_that_cpo_collects_are_left_as_they_were(base, tmp_path):
    class HFTCPOTrainer(HFTMixin, CPOTrainer):
        pass

    rows = Dataset.from_list([{"prompt": f"Who is {i}?", "chosen": " Ada", "rejected": " Bob"} for i in range(4)])
    given = {"train_dataset": rows, "processing_class": load_tokenizer(str(base)), "hft_config": GRADIENT}
    trainer = HFTCPOTrainer(AutoModelForCausalLM.from_pretrained(base), CPOConfig(str(tmp_path), **QUIET), **given)
    assert not trainer._stored_metrics["train"]


def test_least_is_the_other_end_and_the_seed_draws_the_rows(base, tulu, tmp_path):
    squares = {}
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig())
    for seed in (1, 1, 2):
        rows = drawn_rows(trainer, replace(TWO_ROWS, seed=seed))
        squares.setdefault(seed, []).append(gradient_squares(trainer, trainer.model, NAMES, rows))
    assert squares[1][0] == squares[1][1] != squares[2][0]
    halves = [
        sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(strategy="importance", importance="gradient_norm", importance_order=order)).hft_selection
        for order in ("most", "least")
    ]  # fmt: skip
    assert halves[0].share == halves[1].share
    layers = [{name for name in half.trainable if "_proj" in name} for half in halves]
    assert len(layers[0] & layers[1]) < 0.2 * len(layers[0])


def test_no_whole_gradient_is_kept(base, tulu, tmp_path, monkeypatch):
    """When a gradient is there, those before it are gone."""
    alive = []
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig())
    model = trainer.model
    plain = torch.linalg.vector_norm

    def norm(*args, **kwargs):
        alive.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "vector_norm", norm)
    names = [name for name, _ in model.named_parameters() if ".layers." in name]
    gradient_squares(trainer, model, names, drawn_rows(trainer, TWO_ROWS))
    assert alive == [1] * 2 * len(names)


def test_streamed_rows_are_refused(base, tulu, tmp_path):
    trainer = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig())
    for rows in (tulu.to_iterable_dataset(), None, Dataset.from_list([])):
        trainer.train_dataset = rows
        with pytest.raises(HFTError, match="no rows can be drawn"):
            drawn_rows(trainer, TWO_ROWS)


@pytest.mark.parametrize("hft", [GRADIENT, WANDA, HFTConfig(strategy="element")])
@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_backends_that_divide_parameters_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, hft, variable):
    monkeypatch.setenv(variable, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(
        HFTError,
        match=r"divides the whole parameters .*: train in one process or with DDP, or set hft\.(strategy|importance) to",
    ):
        check(None, hft)
    check(None, HFTConfig(strategy="importance"))


def test_fp16_is_refused_for_gradients(tmp_path):
    class Args:
        deepspeed_plugin = fsdp_plugin_args = parallelism_config = None
        use_cpu = True
        mixed_precision = "fp16"

    with pytest.raises(HFTError, match="in fp16 small gradients become 0"):
        check(Args(), GRADIENT)
    check(Args(), WANDA)


def test_a_loss_of_many_completions_has_no_gradient_of_a_row(tmp_path):
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(
        HFTError, match=r"hft.importance is 'gradient_norm', but .*: set hft.importance to weight_norm"
    ):
        check(args, GRADIENT)
    check(args, WANDA)


def test_two_processes_choose_the_same_and_keep_frozen_elements(base, tulu, tmp_path):
    """DDP: the half by gradients is that of one process; frozen elements keep their bits."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "ddp_choices.py",
    ]
    result = subprocess.run(
        [*command, str(base), str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    alone = {
        name: sft_trainer(HFTSFTTrainer, base, tulu, tmp_path / f"alone {name}", hft).hft_selection.digest
        for name, hft in (("importance", GRADIENT), ("wanda", WANDA))
    }
    for process in (0, 1):
        found = json.loads((tmp_path / f"{process}.json").read_text())
        assert found == {"processes": 2, **alone}
    before, after, selection = weights(base), weights(tmp_path / "element"), Selection.load(tmp_path / "element")
    assert selection.masked
    for name in selection.masked:
        learns = selection.masks.draw(name, before[name].shape)
        assert torch.equal(before[name][~learns], after[name][~learns])
        assert (before[name] != after[name])[learns].any()


@pytest.fixture
def measured(monkeypatch):
    """
    How often gradients were measured; each time they come out so that another half is drawn, as may happen on a GPU.
    """
    original, calls = calibration.gradient_squares, []

    def unstable(*args):
        calls.append(args)
        squares = original(*args)
        return squares if len(calls) % 2 else {name: 1 / (value + 1e-12) for name, value in squares.items()}

    monkeypatch.setattr(calibration, "gradient_squares", unstable)
    return calls


def test_a_run_resumes_with_its_own_half_though_gradients_would_choose_another(base, tulu, tmp_path, measured):
    settings = {"save_strategy": "steps", "save_steps": 2}
    first = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / "run", TWO_ROWS, **settings)
    first.train()
    again = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / "run", TWO_ROWS, **settings)
    assert again.hft_selection == first.hft_selection
    assert len(measured) == 1
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert (
        sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / "other", TWO_ROWS).hft_selection != first.hft_selection
    )


def test_other_rows_settings_and_weights_are_measured_anew(base, tulu, tmp_path, measured):
    sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, TWO_ROWS)
    changed = tulu.map(
        lambda row: {"messages": [{**turn, "content": turn["content"] + "!"} for turn in row["messages"]]}
    )
    for number, (rows, settings) in enumerate(
        (
            (changed, {}),
            (changed, {"label_smoothing_factor": 0.1}),
            (tulu, {"loss_type": "dft"}),
            (tulu, {"bf16": True}),
        ),
        2,
    ):
        sft_trainer(ResumableSFTTrainer, base, rows, tmp_path, TWO_ROWS, **settings)
        assert len(measured) == number
    (tmp_path / FILE).write_text("{")
    sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, TWO_ROWS, bf16=True)
    assert len(measured) == 6
    sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, TWO_ROWS, bf16=True, learning_rate=1e-3)
    assert len(measured) == 6  # which changes no gradient


def test_another_reference_is_measured_anew(base, ultrafeedback, tmp_path, measured):
    for norm, times in ((1.0, 1), (2.0, 2), (2.0, 2)):
        reference = AutoModelForCausalLM.from_pretrained(base)
        torch.nn.init.constant_(reference.model.norm.weight, norm)
        dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path, TWO_ROWS, ref_model=reference)
        assert len(measured) == times
