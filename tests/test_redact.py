"""Secrets are hidden by name and by form, and nothing else is."""

import dataclasses
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, SFTConfig

from hft_trl.continual.continual_arguments import ContinualArguments, LoRAArguments
from hft_trl.recipe.arguments import DataArguments, ModelArguments, RunArguments, StageArguments
from hft_trl.redact import HIDDEN, is_secret, redact, redact_text

TYPES = (
    *(SFTConfig, DPOConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig, RunArguments, ModelArguments),
    *(DataArguments, LoRAArguments, StageArguments, ContinualArguments),
)


def test_of_all_settings_of_all_recipes_the_hubs_token_alone_is_secret():
    names = {field.name for kind in TYPES for field in dataclasses.fields(kind)}
    assert {name for name in names if is_secret(name)} == {"hub_token"}


@pytest.mark.parametrize(
    "name",
    [
        *("token", "--sft.hub_token", "--hub-token", "HF_TOKEN", "WANDB_API_KEY", "apiKey", "APIKey", "aws.secret"),
        *("password", "auth_token", "use_auth_token", "access_key", "client_secret", "credentials"),
    ],
)
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "eos_token",
            "pad_token",
            "sft.eos_token",
            "--pad-token",
            "bos_token_id",
            "max_new_tokens",
            "image_token_ids",
        ),
        *(
            "average_tokens_across_devices",
            "num_key_value_heads",
            "include_num_input_tokens_seen",
            "tokenizer",
            "keys",
        ),
        *("dataset_text_field", "monkey_patch", "include_tokens_per_second", "secretary"),
    ],
)
def test_names_that_hold_no_secret(name):
    assert not is_secret(name)
    assert redact({name: "x"}) == {name: "x"}
    assert redact([f"--{name}", "x"]) == [f"--{name}", "x"]


TOKEN = "hf_NOTSECRET"


@pytest.mark.parametrize(
    "line",
    [
        "recipes/x.py --sft.hub_token VALUE --sft.max_steps 2",
        "recipes/x.py --sft.hub_token=VALUE --sft.max_steps 2",
        "recipes/x.py --hub-token VALUE --max_steps 2",
        """recipes/x.py --sft.model_init_kwargs '{"token": "VALUE", "dtype": "float32"}' --sft.max_steps 2""",
        """recipes/x.py --sft.model_init_kwargs='{"api_key": "VALUE", "dtype": "float32"}' --sft.max_steps 2""",
        "recipes/x.py --sft.dataset https://me:VALUE@host/rows.jsonl --sft.max_steps 2",
    ],
)
@pytest.mark.parametrize("value", [TOKEN, "hunter2"])
def test_a_command_line_hides_the_secret_and_keeps_the_rest(line, value):
    words = shlex.split(line.replace("VALUE", value))
    hidden = redact(words)
    assert value not in shlex.join(hidden)
    assert len(hidden) == len(words)
    assert hidden[-1] == "2"
    assert redact(hidden) == hidden
    assert value not in redact_text(line.replace("VALUE", value))


def test_a_token_is_hidden_by_its_form_whatever_it_is_called():
    for text in (
        f"run-{TOKEN}.",
        f"'{TOKEN}' is no flag",
        f"https://x/{TOKEN}",
        "hf_abcDEFghiJKLmnoPQRstuVWXyz0123456789",
    ):
        assert "hf_" not in redact_text(text)
    for text in (
        "hf_argument_parser",
        "hf_transfer",
        "pip install hf_xet",
        "mail@host",
        "https://host/a@b",
        "HF_HOME",
    ):
        assert redact_text(text) == text


def test_nested_settings_keep_their_shape():
    settings = {
        "sft": {"model_init_kwargs": {"token": "x", "dtype": "float32"}, "eos_token": "</s>", "seed": 1},
        "model": {"token": True, "files": ["a", {"password": 7}]},
        "lora": {"target_modules": ["query", "key", "value"]},
    }
    assert redact(settings) == {
        "sft": {"model_init_kwargs": {"token": HIDDEN, "dtype": "float32"}, "eos_token": "</s>", "seed": 1},
        "model": {"token": True, "files": ["a", {"password": HIDDEN}]},
        "lora": {"target_modules": ["query", "key", "value"]},
    }


@pytest.mark.parametrize(
    "text",
    [
        "unknown key sft.hub_token: did you mean sft.hub_model_id?",
        "--sft.hub_token: expected one argument",
        "output_dir 'runs/x' was made with other settings (sft.seed 42 there, 7 here)",
    ],
)
def test_messages_without_a_secret_stay_as_they_are(text):
    assert redact_text(text) == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_whatever_is_hidden_once_stays_as_it_is(value):
    once = redact(value)
    assert redact(once) == once
