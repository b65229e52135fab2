"""Numbers with which training would fail late, or never end, are rejected where they are parsed."""

import shlex

import pytest
from conftest import one_line, parse_recipe

from hft_trl import HFTError, demo


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--sft.learning_rate nan", "sft.learning_rate is nan: it must be a finite number"),
        ("--dpo.beta inf", "dpo.beta is inf: it must be a finite number"),
        ("--dpo.per_device_train_batch_size 0", "dpo.per_device_train_batch_size is 0: it must be from 1"),
        ("--sft.dataloader_num_workers=-1", "sft.dataloader_num_workers is -1: it must be from 0"),
        ("--sft.gradient_accumulation_steps 0", "sft.gradient_accumulation_steps is 0: it must be from 1"),
        ("--sft.seed 4294967296", "sft.seed is 4.29497e+09: it must be from 0"),
        (f"--sft.max_steps {10**30}", "sft.max_steps is 1e+30: it must be from -1"),
    ],
)
def test_a_number_out_of_bounds_is_one_line_that_names_it(flags, said):
    with pytest.raises(HFTError) as error:
        parse_recipe(shlex.split(flags), default_config=demo.RECIPE)
    assert one_line(error).startswith(said)


def test_the_defaults_of_transformers_and_trl_are_within_bounds():
    """They are not looked at: only what the user gives is."""
    assert parse_recipe(["--sft.max_steps", "-1"], default_config=demo.RECIPE).stages["sft"].args.max_steps == -1
