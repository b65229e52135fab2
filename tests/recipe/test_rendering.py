"""A chat template has to take every row, and to write all that a model should learn from."""

import copy
from importlib.resources import files

import pytest
from conftest import one_line
from datasets import Dataset

from hft_trl.chat import tulu_template
from hft_trl.errors import HFTError
from hft_trl.recipe.rows import check_rendered, preference_dataset, sft_dataset

USER, ANSWER = {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "7 degrees."}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"city": "Ghent"}}}]}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}]
SILENT = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"


def template(name: str) -> str:
    return files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture
def check(tokenizer):
    def checked(rows: list[dict], own: str, read=sft_dataset) -> None:
        tried = copy.deepcopy(tokenizer)
        tried.chat_template = own
        check_rendered(tried, read(Dataset.from_list(rows, on_mixed_types="use_json"), "rows"), "rows")

    return checked


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gptoss", "glm4moe", "qwen3_training"])
def test_tool_calls_pass_where_the_template_writes_them(check, name):
    check([{"messages": [USER, ANSWER]}, {"messages": [USER, CALL]}], template(name))
    check([{"messages": [USER, CALL], "tools": TOOLS}], template(name))


@pytest.mark.parametrize(
    ("own", "messages", "words"),
    [
        (SILENT, [USER, CALL], "leaves out the tool calls of message 1"),
        (SILENT, [USER, {**CALL, "content": "I look."}], "leaves out the tool calls of message 1"),
        (template("llama3"), [USER, CALL], "leaves out the tool calls"),
        (template("phi3"), [{"role": "developer", "content": "Be brief."}, USER, ANSWER], "leaves out message 0"),
        (tulu_template(), [USER, CALL], "no form for tool calls"),
        (tulu_template(), [{"role": "developer", "content": "Be brief."}, USER, ANSWER], "Unknown role 'developer'"),
        (template("gemma"), [{"role": "system", "content": "Be brief."}, USER, ANSWER], "rejects it"),
        ("{{ messages[0].content + none }}", [USER, ANSWER], "rejects it"),
    ],
)
def test_what_a_template_refuses_or_leaves_out_is_named_by_its_row(check, own, messages, words):
    with pytest.raises(HFTError) as error:
        check(
            [{"messages": [USER, ANSWER]}] * (own != "{{ messages[0].content + none }}") + [{"messages": messages}],
            own,
        )
    assert words in one_line(error)
    assert "of rows: the chat template" in one_line(error)
    assert "set chat_template" in one_line(error)
    assert ("row 1" in one_line(error)) == ("none" not in own)


def test_tools_have_to_be_written(check):
    rows = [{"messages": [USER, ANSWER], "tools": None}, {"messages": [USER, ANSWER], "tools": TOOLS}]
    for own, words in ((SILENT, "leaves out the tools"), (tulu_template(), "no form for tools")):
        with pytest.raises(HFTError, match=rf"row 1 of rows.*{words}"):
            check(rows, own)
    check(rows[:1], tulu_template())


def test_settings_of_a_row_s_template_have_names(check):
    with pytest.raises(HFTError, match=r"row 0 of rows: .* rejects it .'str' object is not a mapping"):
        check([{"messages": [USER, ANSWER], "chat_template_kwargs": "none"}], SILENT)


def test_completions_and_both_sides_of_a_pair_are_rendered_after_their_prompt(check):
    once = "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('bad') }}{% endif %}{{ m['content'] }}{% endfor %}"
    bad = {"role": "assistant", "content": "bad"}
    check([{"prompt": [USER], "completion": [ANSWER]}], once)
    with pytest.raises(HFTError, match=r"row 0 of rows.*bad"):
        check([{"prompt": [USER], "completion": [bad]}], once)
    with pytest.raises(HFTError, match=r"row 0 of rows.*bad"):
        check([{"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER, USER, bad]}], once, preference_dataset)


def test_plain_text_needs_no_template(check):
    check([{"text": "hi"}], "{{ raise_exception('never') }}")
    check([{"prompt": "a", "completion": "b"}], "{{ raise_exception('never') }}")
