"""Convert the columns and messages of public data sets to TRL's conversations."""

import json
from collections.abc import Collection, Mapping
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Features, Json, List, Value
from datasets.fingerprint import Hasher
from trl import extract_prompt, maybe_convert_to_chatml
from trl.trainer.utils import remove_none_values

from hft_trl.environment import package_version
from hft_trl.errors import HFTError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant")}
# Fields that chat templates read. Others (ids, scores, models) would only make equal messages differ.
FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")

# Names of columns in public data sets, by what they hold. The first one that exists is read.
NAMES = {
    "system": ("system", "system_prompt"),
    "chat": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "instruction", "question", "query", "conversations", "input"),
    "context": ("input", "context"),
    "completion": ("completion", "output", "response", "answer"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}
ANSWERS = ("completion", "chosen", "rejected")
WITH_CONTEXT = ("instruction", "question", "query")  # columns that an `input` or a `context` belongs to
OPTIONAL = ("tools", "chat_template_kwargs")  # columns that TRL reads in addition


def find_parts(columns: Collection[str], preference: bool) -> dict[str, str]:
    """Return the column of each part of a pair, chat or completion, or nothing if no layout fits."""
    found = {part: name for part, names in NAMES.items() for name in reversed(names) if name in columns}
    if found.get("prompt") not in WITH_CONTEXT:
        found.pop("context", None)
    around, needed = ("system", "prompt", "context"), ("prompt", "completion")
    if preference:
        needed = ("chosen", "rejected")
    elif "chat" in found:
        around, needed = ("system",), ("chat",)
    if not set(needed) <= found.keys():
        return {}
    return {part: name for part, name in found.items() if part in (*around, *needed)}


def read_conversations(dataset: Dataset, parts: dict[str, str], name: str) -> Dataset:
    """Convert rows with the columns `parts` to TRL's form. Errors name the data set."""
    optional = [column for column in OPTIONAL if column in dataset.column_names]
    read = {column: _fields_read(dataset.features[column]) for column in parts.values()}
    read |= {column: dataset.features[column] for column in optional}
    if dates := [column for column, feature in read.items() if "Value('timestamp" in str(feature)]:
        raise HFTError(
            f"{name}: the column {dates[0]} holds dates, which datasets makes of texts such as 2026-01-31 in JSON: "
            "save the rows as a .parquet file, in which they stay text."
        )
    histories = enumerate(dataset["history"] if "history" in dataset.column_names else ())
    if (number := next((number for number, turns in histories if turns), None)) is not None:
        raise HFTError(f"row {number} of {name} has earlier turns in history: give all turns as messages.")
    if _is_in_form(dataset, parts):
        return dataset
    wanted = ["messages"] if "chat" in parts else ["prompt", *(side for side in ANSWERS if side in parts)]
    features = {**dict.fromkeys(wanted, List(Json())), **dict.fromkeys(optional, Json())}
    # datasets hashes an imported function by its name, and would reuse rows that another version of it read
    reader = [Path(__file__).read_text(encoding="utf-8"), package_version("trl")]
    with PartialState().main_process_first():
        return dataset.map(
            partial(_read, name=name, parts=parts, optional=optional),
            with_indices=True,
            remove_columns=dataset.column_names,
            features=Features(features),
            new_fingerprint=Hasher.hash([dataset._fingerprint, reader, name, parts, optional]),
            desc="Reading conversations",
        )


def _fields_read(feature: Any) -> Any:
    """Return a column's type, of messages only that of the fields that are read."""
    turn = feature.feature if isinstance(feature, List) else feature
    return {name: turn.get(name) for name in (*FIELDS, "from", "value")} if isinstance(turn, dict) else turn


def _is_in_form(dataset: Dataset, parts: dict[str, str]) -> bool:
    """Return whether TRL takes the rows unchanged: `messages`, or texts under TRL's names."""
    if {*OPTIONAL} & {*dataset.column_names}:
        return False
    first = dataset[0]
    if parts == {"chat": "messages"}:
        plain = List({"role": Value("string"), "content": Value("string")})
        return dataset.features["messages"] == plain and all(turn["role"] in ROLES for turn in first["messages"] or [])
    return parts.keys() <= {"prompt", *ANSWERS} and all(
        part == column and not isinstance(first[column], list | dict) for part, column in parts.items()
    )


def _read(row: dict[str, Any], number: int, name: str, parts: dict[str, str], optional: list[str]) -> dict[str, Any]:
    where = f"row {number} of {name}"
    # In Arrow's structs, missing keys are None
    row = {key: remove_none_values(value) if isinstance(value, list | dict) else value for key, value in row.items()}
    # Some templates write a preamble even for an empty list of tools
    read = {column: _parsed(row[column]) or (None if column == "tools" else {}) for column in optional}
    given = {part: row[column] for part, column in parts.items()}
    system = conversation(given["system"], "system", f"{where}, system") if given.get("system") else []
    if "chat" in given:
        if isinstance(given["chat"], str):  # in the other parts a text is one message
            check_messages(given["chat"], where)
        return {**read, "messages": _after_system(system, conversation(given["chat"], "user", where))}

    sides = {part: conversation(given[part], "assistant", f"{where}, {part}") for part in ANSWERS if part in given}
    asked, repeated = given.get("prompt"), []
    if not any(_is_answer(turns[0]) for turns in sides.values()):
        # The turns before the answers: those that both sides share, or those before the first answer
        if "chosen" in sides:
            repeated = extract_prompt(sides)["prompt"]
        else:
            repeated = list(takewhile(lambda turn: not _is_answer(turn), sides["completion"]))
        if isinstance(asked, str):
            asked = None  # UltraFeedback repeats the prompt as text beside whole conversations
    if isinstance(asked, str) and given.get("context"):
        if not isinstance(given["context"], str | int | float):
            raise HFTError(f"{where}, {parts['context']} is {given['context']!r:.80}: it must be text.")
        asked = f"{asked}\n\n{given['context']}"
    prompt = conversation(asked, "user", f"{where}, prompt") if asked else []
    if prompt and repeated and not any(repeated[i : i + len(prompt)] == prompt for i in range(len(repeated))):
        raise HFTError(
            f"{where}: the answers begin with {repeated[0]!r:.80}, which is not the prompt: give only the answers."
        )
    answers = {side: turns[len(repeated) :] for side, turns in sides.items()}
    return {**read, "prompt": _after_system(system, repeated or prompt), **answers}


def _is_answer(message: Message) -> bool:
    return message["role"] in ("assistant", "tool")


def _after_system(system: list[Message], turns: list[Message]) -> list[Message]:
    return turns if turns and turns[0]["role"] == "system" else system + turns


def conversation(value: Any, role: str, where: str) -> list[Message]:
    """Return a text of `role`, a message or messages, ShareGPT's too, with the fields of templates."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list):
        value = [_message(message) if isinstance(message, Mapping) else message for message in value]
    check_messages(value, where)
    return value


def check_messages(messages: Any, where: str) -> None:
    """Check that a value is a list of messages with known roles and with texts."""
    if not isinstance(messages, list) or not messages:
        raise HFTError(
            f"{where} is {messages!r:.80}: give a list of messages such as {{'role': 'user', 'content': '...'}}."
        )
    for turn, message in enumerate(messages):
        is_message = isinstance(message, Mapping) and message.get("role") in ROLES
        if not is_message or not isinstance(message.get("content"), str):
            raise HFTError(
                f"{where}, message {turn} is {message!r:.80}: give it a role ({', '.join(ROLES)}) and text as content "
                "(only an assistant's message with tool_calls may have none)."
            )
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(_function(call).get("name"), str) for call in calls):
            raise HFTError(
                f"{where}, message {turn} has tool_calls {calls!r:.80}: give a list such as "
                "[{'function': {'name': '...', 'arguments': {...}}}]."
            )


def _message(message: Mapping[str, Any]) -> Message:
    (named,) = maybe_convert_to_chatml({"messages": [dict(message)]})["messages"]  # from and value
    turn = {field: named[field] for field in FIELDS if named.get(field) is not None}
    if "content" in named:
        turn.setdefault("content", None)
    if isinstance(turn.get("role"), str):
        turn["role"] = SHAREGPT_ROLES.get(turn["role"].lower(), turn["role"])
    if isinstance(turn.get("tool_calls"), list) and turn["tool_calls"]:
        turn["content"] = turn.get("content") or ""
        turn["tool_calls"] = [
            {**call, "function": {**called, "arguments": _parsed(called["arguments"])}}
            if "arguments" in (called := _function(call))
            else call
            for call in turn["tool_calls"]
        ]
    return turn


def _function(call: Any) -> Mapping[str, Any]:
    """Return the name and the arguments of a tool call, or nothing if it is none."""
    function = call.get("function") if isinstance(call, Mapping) else None
    return function if isinstance(function, Mapping) else {}


def _parsed(value: Any) -> Any:
    """Parse arguments in JSON text, OpenAI's form. Invalid JSON stays text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value
