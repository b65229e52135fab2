"""Messages: any public form becomes the one that chat templates read, and what is no message is named."""

import pytest
from conftest import one_line

from hft_trl.errors import HFTError
from hft_trl.recipe.layouts import check_messages, conversation

USER = {"role": "user", "content": "Weather?"}


def call(arguments, **more) -> dict:
    return {"type": "function", "function": {"name": "look", "arguments": arguments}, **more}


def test_the_roles_and_fields_of_sharegpt_are_renamed():
    said = [("system", "a"), ("human", "b"), ("gpt", "c"), ("Human", "d"), ("chatgpt", "e"), ("tool", "f")]
    read = conversation([{"from": who, "value": what} for who, what in said], "user", "here")
    roles = ["system", "user", "assistant", "user", "assistant", "tool"]
    assert read == [{"role": role, "content": what} for role, (_, what) in zip(roles, said, strict=True)]


def test_only_what_templates_read_is_kept():
    tool = {"role": "tool", "content": "7", "tool_call_id": "x", "name": "look", "id": 3, "score": None}
    thought = {"role": "assistant", "content": "7", "reasoning_content": "hm", "model": "m"}
    assert conversation([tool, thought], "user", "here") == [
        {"role": "tool", "content": "7", "tool_call_id": "x", "name": "look"},
        {"role": "assistant", "content": "7", "reasoning_content": "hm"},
    ]


@pytest.mark.parametrize("beside", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("arguments", [{"city": "Ghent"}, '{"city": "Ghent"}'])
def test_tool_calls_are_taken_in_every_common_form(beside, arguments):
    read = conversation(
        [USER, {"role": "assistant", **beside, "tool_calls": [call(arguments, id="1")]}], "user", "here"
    )
    assert read[1] == {"role": "assistant", "content": "", "tool_calls": [call({"city": "Ghent"}, id="1")]}
    check_messages(read, "here")


def test_arguments_that_are_no_json_stay_as_they_are():
    [read] = conversation({"role": "assistant", "tool_calls": [call("{city: Ghent")]}, "user", "here")
    assert read["tool_calls"] == [call("{city: Ghent")]


def test_the_role_developer_is_a_matter_of_the_template():
    check_messages([{"role": "developer", "content": "Be brief."}, USER], "here")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "robot", "content": "a"}, "'robot'"),
        ({"role": "user", "content": None}, "'content': None"),
        ({"role": "user"}, "give it a role"),
        ({"content": "a"}, "give it a role"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, "tool_calls"),
        ({"role": "assistant", "tool_calls": ["look"]}, "tool_calls"),
        ({"role": "assistant", "content": "", "tool_calls": "look"}, "tool_calls"),
        ("hi", "give it a role"),
        (None, "give it a role"),
    ],
)
def test_what_is_no_message_is_named_by_its_number(message, words):
    with pytest.raises(HFTError) as error:
        check_messages(conversation([USER, message], "user", "here"), "here")
    assert "here, message 1" in one_line(error)
    assert words in one_line(error)
