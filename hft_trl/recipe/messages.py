"""Read and check conversations: public forms of messages become the one that chat templates take."""

import json
import re
from collections.abc import Mapping
from typing import Any

from hft_trl.errors import HFTError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_FIELDS = {"from": "role", "value": "content"}
SHAREGPT_ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant")}
# Fields that chat templates read. Others (ids, scores, models) would only make equal messages differ.
FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")  # of Anthropic's hh-rlhf, where a dialogue is one text
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def conversation(value: Any, role: str, where: str) -> list[Message]:
    """
    Read a value as messages: a text of `role`, an hh-rlhf dialogue, one message or a list of them.

    Messages may have ShareGPT's fields and roles. Only the fields that chat templates read are kept. With tool calls,
    a missing content becomes `""` and arguments in JSON become a dictionary. `where` names the value in errors.
    """
    if isinstance(value, str):
        return _dialogue(value) if is_dialogue(value) else [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        value = [value]
    check_messages(value, where, known=False)
    return [_message(message) for message in value]


def is_dialogue(value: Any) -> bool:
    """Return whether a value is a dialogue in hh-rlhf's form, one text with all turns."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def check_messages(messages: Any, where: str, known: bool = True) -> None:
    """Check that a value is a list of messages, if `known` with known roles and with texts."""
    if not isinstance(messages, list) or not messages:
        raise HFTError(
            f"{where} is {messages!r:.80}: give a list of messages such as {{'role': 'user', 'content': '...'}}."
        )
    for turn, message in enumerate(messages):
        if not isinstance(message, Mapping) or (known and not {"role", "content"} <= message.keys()):
            raise HFTError(f"{where}, message {turn} is {message!r:.80}: give it a role and a content.")
        if not known:
            continue
        if message["role"] not in ROLES:
            raise HFTError(f"{where}, message {turn} has role {message['role']!r}: the roles are {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            raise HFTError(
                f"{where}, message {turn} has content {message['content']!r:.80}: it must be text (only an "
                "assistant's message with tool_calls may have none)."
            )
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(map(_is_call, calls)):
            raise HFTError(
                f"{where}, message {turn} has tool_calls {calls!r:.80}: give a list such as "
                "[{'function': {'name': '...', 'arguments': {...}}}]."
            )


def is_said(message: Mapping[str, Any]) -> bool:
    """Return whether a message has tool calls or more than white space."""
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
    """Parse arguments in JSON (OpenAI's form), which many templates reject and others write in quotes."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"])}
    text = call.get("arguments")
    if not isinstance(text, str) or not text.lstrip().startswith("{"):
        return dict(call)
    try:
        return {**call, "arguments": json.loads(text)}
    except json.JSONDecodeError:  # a model may have written invalid JSON, which is trained on unchanged
        return dict(call)


def _dialogue(text: str) -> list[Message]:
    _, *parts = _HH_TURN.split(text)
    return [
        {"role": _HH_ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
