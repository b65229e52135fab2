"""Gradient norms are measured once for a run, so that it resumes with the half that it was started with."""

import pytest
from training import ResumableSFTTrainer, sft_trainer

from hft_trl import HFTConfig
from hft_trl.trainers import gradient_norms
from hft_trl.trainers.gradient_norms import FILE

GRADIENT = HFTConfig(strategy="importance", importance="gradient_norm", calibration_samples=2)


@pytest.fixture
def measured(monkeypatch):
    """
    How often gradients were measured; each time they come out so that another half is drawn, as may happen on a GPU.
    """
    original, calls = gradient_norms.gradient_squares, []

    def unstable(*args):
        calls.append(args)
        squares = original(*args)
        return squares if len(calls) % 2 else {name: 1 / (value + 1e-12) for name, value in squares.items()}

    monkeypatch.setattr(gradient_norms, "gradient_squares", unstable)
    return calls


def test_a_run_resumes_with_its_own_half_though_gradients_would_choose_another(base, tulu, tmp_path, measured):
    settings = {"save_strategy": "steps", "save_steps": 2}
    first = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / "run", GRADIENT, **settings)
    first.train()
    again = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / "run", GRADIENT, **settings)
    assert again.hft_selection == first.hft_selection
    assert len(measured) == 1
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert (
        sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / "other", GRADIENT).hft_selection != first.hft_selection
    )


def test_other_rows_settings_and_weights_are_measured_anew(base, tulu, tmp_path, measured):
    sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, GRADIENT)
    changed = tulu.map(
        lambda row: {"messages": [{**turn, "content": turn["content"] + "!"} for turn in row["messages"]]}
    )
    for number, (rows, settings) in enumerate(
        ((changed, {}), (tulu, {"loss_type": "dft"}), (tulu, {"bf16": True})), 2
    ):
        sft_trainer(ResumableSFTTrainer, base, rows, tmp_path, GRADIENT, **settings)
        assert len(measured) == number
    (tmp_path / FILE).write_text("{")
    sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, GRADIENT, bf16=True)
    assert len(measured) == 5
    sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path, GRADIENT, bf16=True, learning_rate=1e-3)
    assert len(measured) == 5  # which changes no gradient
