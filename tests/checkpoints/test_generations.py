"""GRPO and RLOO train a half and resume exactly, from steps at which new completions are generated."""

import pytest
import torch
from conftest import one_line
from datasets import Dataset
from training import QUIET, weights
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from hft_trl import HFTError, HFTMixin, ResumableMixin


class ResumableHFTGRPOTrainer(ResumableMixin, HFTMixin, GRPOTrainer):
    pass


class ResumableHFTRLOOTrainer(ResumableMixin, HFTMixin, RLOOTrainer):
    pass


def trained(kind, config, base, folder, checkpoint=None, **settings):
    args = {**QUIET, "num_generations": 2, "max_completion_length": 4, "max_steps": 4, "save_strategy": "steps"}
    trainer = kind(
        model=str(base),
        args=config(str(folder), **{**args, "per_device_train_batch_size": 2, "save_steps": 2, **settings}),
        train_dataset=Dataset.from_list([{"prompt": f"Question {number}:"} for number in range(8)]),
        reward_funcs=lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions],
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train(checkpoint)
    trainer.save_model()
    learn = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])} == learn
    assert 0 < len(learn) < len(before)
    return trainer


@pytest.mark.parametrize(
    ("kind", "config", "settings"),
    [
        (ResumableHFTGRPOTrainer, GRPOConfig, {"num_iterations": 2}),
        (ResumableHFTGRPOTrainer, GRPOConfig, {"steps_per_generation": 4, "gradient_accumulation_steps": 2}),
        (ResumableHFTRLOOTrainer, RLOOConfig, {"num_iterations": 2, "beta": 0.1}),
    ],
)
def test_a_run_resumes_exactly_where_completions_are_generated_and_nowhere_else(
    base, tmp_path, kind, config, settings
):
    trained(kind, config, base, tmp_path / "a", **settings)
    trained(kind, config, base, tmp_path / "b", tmp_path / "a" / "checkpoint-2", **settings)
    whole, resumed = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())

    trained(kind, config, base, tmp_path / "c", **settings, max_steps=3)  # saves its last step, too
    with pytest.raises(HFTError, match=r"checkpoint-3 is of step 3 .*2 steps train on the same .* multiple of 2") as e:
        trained(kind, config, base, tmp_path / "d", tmp_path / "c" / "checkpoint-3", **settings)
    one_line(e)
    with pytest.raises(HFTError, match=r"save_steps is 3 .* set it to a multiple of 2"):
        trained(kind, config, base, tmp_path / "d", **settings, save_steps=3)
