"""A conversation: its turns brought into the one form that chat templates read, and checked."""

import json
import re
from collections.abc import Mapping
from typing import Any

from hft_trl.errors import HFTError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_FIELDS = {"from": "role", "value": "content"}
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
# What chat templates read of a message. All else (ids, scores, models) would only make equal turns differ.
FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")  # of Anthropic's hh-rlhf, whose dialogues are one text
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def conversation(value: Any, role: str, where: str) -> list[Message]:
    """
    Read one value of a row as turns.

    Args:
        value (`str`, `dict` or `list[dict]`):
            A text, which is one turn unless it is a dialogue in hh-rlhf's form (`"\\n\\nHuman: ...\\n\\nAssistant: ..."`); one
            message; or a list of messages, as `role` and `content` or as ShareGPT's `from` and `value`.
        role (`str`):
            Who says the text.
        where (`str`):
            What errors call the value.

    Returns:
        `list[dict]`: Messages with no other fields than those that chat templates read. Beside tool calls, a missing content
        is `""` and arguments in JSON are a dictionary, the form that every template takes.

    Raises:
        [`HFTError`]: If the value is something else.
    """
    if isinstance(value, str):
        return _dialogue(value) if is_dialogue(value) else [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        value = [value]
    check_messages(value, where, known=False)
    return [_message(message) for message in value]


def is_dialogue(value: Any) -> bool:
    """Whether a value is a dialogue in hh-rlhf's form."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def check_messages(messages: Any, where: str, known: bool = True) -> None:
    """
    Check that a value is a list of messages.

    Each must have a known role and a text, unless the messages are still to be converted.

    Raises:
        [`HFTError`]: Naming the first message that is wrong.
    """
    if not isinstance(messages, list) or not messages:
        raise HFTError(
            f"{where} is {messages!r:.80}: give a list of messages such as {{'role': 'user', 'content': '...'}}."
        )
    for turn, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise HFTError(f"{where}, message {turn} is {message!r:.80}: give it a role and a content.")
        if not known:
            continue
        if not {"role", "content"} <= message.keys():
            raise HFTError(f"{where}, message {turn} is {message!r:.80}: give it a role and a content.")
        if message["role"] not in ROLES:
            raise HFTError(f"{where}, message {turn} has role {message['role']!r}: the roles are {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            raise HFTError(
                f"{where}, message {turn} has content {message['content']!r:.80}: it must be text (only an assistant's message "
                "with tool_calls may have none)."
            )
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(map(_is_call, calls)):
            raise HFTError(
                f"{where}, message {turn} has tool_calls {calls!r:.80}: give a list such as {{'function': {{'name': '...', 'arguments': "
                "{...}}}."
            )


def is_said(message: Mapping[str, Any]) -> bool:
    """Whether a message holds more than white space."""
    return bool(message["content"].strip() or message.get("tool_calls"))


def _message(message: Mapping[str, Any]) -> Message:
    named = {SHAREGPT_FIELDS.get(field, field): value for field, value in message.items()}
    turn = {field: named[field] for field in FIELDS if named.get(field) is not None}
    if "content" in named:
        turn.setdefault("content", None)
    if isinstance(turn.get("role"), str):
        turn["role"] = SHAREGPT_ROLES.get(turn["role"].lower(), turn["role"])
    if isinstance(turn.get("tool_calls"), list) and turn["tool_calls"]:
        turn["content"] = turn.get("content") or ""
        turn["tool_calls"] = [_call(call) for call in turn["tool_calls"]]
    return turn


def _is_call(call: Any) -> bool:
    called = call.get("function", call) if isinstance(call, Mapping) else None
    return isinstance(called, Mapping) and isinstance(called.get("name"), str)


def _call(call: Any) -> Any:
    """OpenAI's form has the arguments as JSON text, which many templates refuse and others write as a quoted text."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"])}
    text = call.get("arguments")
    if not isinstance(text, str) or not text.lstrip().startswith("{"):
        return dict(call)
    try:
        return {**call, "arguments": json.loads(text)}
    except json.JSONDecodeError:  # what a model wrote need not be JSON, and is trained on as it is
        return dict(call)


def _dialogue(text: str) -> list[Message]:
    _, *parts = _HH_TURN.split(text)
    return [
        {"role": _HH_ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
