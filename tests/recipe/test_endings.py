"""A tuned model stops where it learned to, and what it would be saved with can be saved."""

import pytest
from conftest import QUIET, tiny_llama, tulu_row, ultrafeedback_row
from datasets import Dataset
from transformers import GenerationConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hft_trl.chat import tulu_template
from hft_trl.errors import HFTError
from hft_trl.recipe.endings import settle_generation, settle_sampling, trained_ends

CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


@pytest.fixture
def chatml(tokenizer):
    """A tokenizer whose turns end with another token than its texts."""
    own = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    own.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    own.chat_template = CHATML
    return own


@pytest.fixture
def prepared(tmp_path):
    """A trainer whose rows are prepared."""

    def trainer(tokenizer, kind=SFTTrainer, rows=None, **settings):
        config = SFTConfig if kind is SFTTrainer else DPOConfig
        given = {"processing_class": tokenizer, "args": config(output_dir=str(tmp_path), **{**QUIET, **settings})}
        model = tiny_llama(len(tokenizer))
        reference = {} if kind is SFTTrainer else {"ref_model": tiny_llama(len(tokenizer))}
        return kind(model, train_dataset=Dataset.from_list(rows), **reference, **given)

    return trainer


CHATS = [{"messages": tulu_row(number)["messages"] * (1 + number % 2)} for number in range(8)]
PAIRS = [{side: ultrafeedback_row(number)[side] for side in ("chosen", "rejected")} for number in range(8)]


@pytest.mark.parametrize(
    "settings",
    [
        {"rows": CHATS, "assistant_only_loss": True},
        {"rows": CHATS},
        {"rows": CHATS, "assistant_only_loss": True, "packing": True, "max_length": 256},
        {"rows": CHATS, "assistant_only_loss": True, "packing": True, "packing_strategy": "wrapped", "max_length": 64},
        {"rows": [{"prompt": row["messages"][:1], "completion": row["messages"][1:2]} for row in CHATS]},
        {"rows": PAIRS, "kind": DPOTrainer},
    ],
)
def test_the_token_that_ends_a_turn_joins_those_that_stop_the_model(prepared, chatml, settings, monkeypatch):
    trainer = prepared(chatml, **settings)
    lines = []
    monkeypatch.setattr("hft_trl.recipe.endings.logger.warning", lines.append)
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    trainer.model.generation_config.eos_token_id = 2
    settle_generation(trainer.model, chatml, trainer.train_dataset)
    assert trainer.model.generation_config.eos_token_id == [2, end]
    assert len(lines) == 1
    assert "<|im_end|>" in lines[0]
    settle_generation(trainer.model, chatml, trainer.train_dataset)
    assert trainer.model.generation_config.eos_token_id == [2, end]
    assert len(lines) == 1


def test_it_is_in_every_save_of_the_model_after_training(prepared, chatml, tmp_path):
    trainer = prepared(chatml, rows=CHATS, max_steps=2, save_strategy="steps", save_steps=1)
    settle_generation(trainer.model, chatml, trainer.train_dataset)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
        stops = GenerationConfig.from_pretrained(folder).eos_token_id
        assert set(stops) == {chatml.eos_token_id, chatml.convert_tokens_to_ids("<|im_end|>")}


def test_nothing_is_said_or_changed_where_turns_end_with_the_eos_token(prepared, tokenizer, monkeypatch):
    own = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    own.chat_template = tulu_template()
    trainer = prepared(own, rows=CHATS)
    monkeypatch.setattr("hft_trl.recipe.endings.logger.warning", pytest.fail)
    before = trainer.model.generation_config.to_dict()
    settle_generation(trainer.model, own, trainer.train_dataset)
    assert trainer.model.generation_config.to_dict() == before


def test_of_the_tokens_that_end_a_text_the_first_ends_the_turn(chatml):
    """As with Phi-3, which writes the token of the text's end after that of the turn; rows that were cut have none."""
    answer, newline = chatml("In Rome.")["input_ids"], chatml("\n")["input_ids"]
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    ended = [*answer, end, *newline, chatml.eos_token_id]
    labels = [[-100, *ended], [-100, *ended, -100, *answer], [*ended[:-1], -100], answer]
    assert trained_ends(Dataset.from_dict({"labels": labels}), chatml) == [end]


@pytest.mark.parametrize(
    ("own", "samples"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, True),
        ({"top_k": 20, "do_sample": False}, True),
        ({"temperature": 0.9, "do_sample": True}, True),
        ({"temperature": 1.0, "top_p": 1.0}, False),
        ({}, False),
    ],
)
def test_a_generation_config_with_settings_of_sampling_samples_and_can_be_saved(own, samples, tmp_path):
    config = GenerationConfig(eos_token_id=2, **own)
    settle_sampling(config)
    assert (config.do_sample is True) == samples
    config.pad_token_id = 0  # transformers is strict with what was changed
    config.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert all(getattr(saved, name) == value for name, value in own.items() if name != "do_sample")


def test_another_generation_config_that_can_not_be_saved_is_rejected_before_training(chatml):
    model = tiny_llama(len(chatml))
    model.generation_config.length_penalty = 2.0
    with pytest.raises(HFTError, match="length_penalty"):
        settle_generation(model, chatml, Dataset.from_dict({"labels": [[1, 2]]}))
