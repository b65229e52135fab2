"""Sample answers of a run's models: what is asked, of whom, and that a report never fails for them."""

from unittest.mock import Mock

import pytest

from hft_trl import HFTError, demo
from hft_trl.recipe.arguments import ModelArguments
from hft_trl.recipe.evaluation import sample_stages


def test_the_embedded_models_answer_two_probes_the_same_every_time():
    """A question and an instruction, side by side, without evaluation rows."""
    start = ModelArguments(model_name_or_path=str(demo.MODEL))
    samples = sample_stages(start, {"sft": str(demo.MODEL)}, None)
    assert [list(sample) for sample in samples] == [["prompt", "base", "sft"]] * 2
    assert all(sample["base"] == sample["sft"] for sample in samples)
    assert len({sample["prompt"] for sample in samples}) == 2


def test_samples_are_asked_of_short_questions_of_the_evaluation_rows(monkeypatch):
    """Of conversations of either stage; plain text, long questions and a run without rows give none."""
    asked = []

    def answer(model, prompts, **_):
        asked.append(model)
        return [prompt.upper() for prompt in prompts]

    monkeypatch.setattr("hft_trl.recipe.evaluation.sample_answers", answer)
    start, stages = ModelArguments(model_name_or_path="org/base", model_revision="v2"), {"dpo": "runs/dpo"}
    rows = [
        {"text": "plain"},
        {"prompt": "plain", "completion": "x"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "one"}]},
        {"messages": [{"role": "user", "content": "long " * 100}]},
        {"prompt": [{"role": "user", "content": "two"}], "chosen": []},
        {"chosen": [{"role": "user", "content": "three"}]},
    ]
    found = sample_stages(start, stages, rows)
    assert found == [{"prompt": text, "base": text.upper(), "dpo": text.upper()} for text in ("one", "two")]
    assert asked == ["org/base@v2", "runs/dpo"]
    assert sample_stages(start, stages, rows[-1:])[0]["prompt"] == "three"
    assert sample_stages(start, stages, rows[:2]) == sample_stages(start, stages, None) == []
    assert len(asked) == 4


@pytest.mark.parametrize("error", [HFTError("no room"), RuntimeError("CUDA out of memory")])
def test_a_model_that_cannot_answer_costs_no_report(monkeypatch, caplog, error):
    monkeypatch.setattr("hft_trl.recipe.evaluation.sample_answers", Mock(side_effect=error))
    with caplog.at_level("WARNING"):
        assert sample_stages(ModelArguments(model_name_or_path=str(demo.MODEL)), {}, None) == []
    assert "Sample answers are left out" in caplog.text
