"""Convert the columns and messages of public data sets to TRL's conversations."""

import json
import re
from collections.abc import Collection, Mapping
from functools import partial
from itertools import takewhile
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Features, Json, List, Value
from trl import extract_prompt
from trl.trainer.utils import remove_none_values

from hft_trl.errors import HFTError

Row = dict[str, Any]
Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_FIELDS = {"from": "role", "value": "content"}
SHAREGPT_ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant")}
# Fields that chat templates read. Others (ids, scores, models) would only make equal messages differ.
FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")  # of Anthropic's hh-rlhf, where a dialogue is one text
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}

# Names of columns in public data sets, by what they hold. The first one that exists is read.
NAMES = {
    "system": ("system", "system_prompt"),
    "chat": ("messages", "conversations", "conversation"),
    "history": ("history",),
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
    found = {part: next((name for name in names if name in columns), None) for part, names in NAMES.items()}
    found = {part: name for part, name in found.items() if name is not None}
    if found.get("prompt") not in WITH_CONTEXT:
        found.pop("context", None)
    around = {"system", "history", "prompt", "context"}
    if preference:
        needed, taken = {"chosen", "rejected"}, around
    elif "chat" in found:
        needed, taken = {"chat"}, {"system"}
    else:
        needed, taken = {"prompt", "completion"}, around
    if not needed <= found.keys():
        return {}
    return {part: name for part, name in found.items() if part in needed | taken}


def read_conversations(dataset: Dataset, parts: dict[str, str], name: str) -> Dataset:
    """
    Convert rows with the columns `parts` from [`find_parts`] to TRL's form. Errors name the data set.

    The prompt contains all turns before the answers once. Texts under TRL's names stay plain text.
    """
    if _is_in_form(dataset, parts):
        return dataset
    wanted = ("messages",) if "chat" in parts else ("prompt", *(side for side in ANSWERS if side in parts))
    features = {column: List(Json()) for column in wanted}
    for column in [column for column in OPTIONAL if column in dataset.column_names]:
        features[column] = dataset.features[column] if _is_text(dataset, column) else Json()
    # In Arrow's structs, missing keys are None. JSON distinguishes null from missing.
    structs = [column for column, feature in dataset.features.items() if not _is_json(feature)]
    with PartialState().main_process_first():
        return dataset.map(
            partial(_read, name=name, parts=parts, optional=sorted(features.keys() & {*OPTIONAL}), structs=structs),
            with_indices=True,
            remove_columns=dataset.column_names,
            features=Features(features),
            desc="Reading conversations",
        )


def _is_in_form(dataset: Dataset, parts: dict[str, str]) -> bool:
    """Return whether TRL takes the rows unchanged: `messages`, or texts under TRL's names."""
    if any(column in dataset.column_names and not _is_text(dataset, column) for column in OPTIONAL):
        return False
    first = dataset[0]
    if parts == {"chat": "messages"}:
        plain = List({"role": Value("string"), "content": Value("string")})
        return dataset.features["messages"] == plain and all(turn["role"] in ROLES for turn in first["messages"] or [])
    return parts.keys() <= {"prompt", *ANSWERS} and all(
        part == column and not isinstance(first[column], list | dict) and not is_dialogue(first[column])
        for part, column in parts.items()
    )


def _is_text(dataset: Dataset, column: str) -> bool:
    return dataset.features[column] == Value("string")


def _is_json(feature: Any) -> bool:
    return isinstance(feature, Json) or (isinstance(feature, List) and isinstance(feature.feature, Json))


def _read(row: Row, number: int, name: str, parts: dict[str, str], optional: list[str], structs: list[str]) -> Row:
    where = f"row {number} of {name}"
    values = {column: row[column] for column in (*parts.values(), *optional)}
    for column in values.keys() & set(structs):
        if isinstance(values[column], list | dict):
            values[column] = remove_none_values(values[column])
    # Some templates write a preamble even for an empty list of tools
    read = {column: values[column] or (None if column == "tools" else {}) for column in optional}
    given = {part: values[column] for part, column in parts.items()}
    if "chat" in given:
        return {**read, "messages": _after_system(given, conversation(given["chat"], "user", where), where)}

    sides = {part: conversation(given[part], "assistant", f"{where}, {part}") for part in ANSWERS if part in given}
    repeated: list[Message] = []
    if not any(_is_answer(turns[0]) for turns in sides.values()):
        if isinstance(given.get("prompt"), str):
            del given["prompt"]  # UltraFeedback repeats the prompt as text beside whole conversations
        repeated = _shared(sides)
    prompt = _joined(_asked(given, where), repeated, where)
    answers = {side: turns[len(repeated) :] for side, turns in sides.items()}
    return {**read, "prompt": _after_system(given, prompt, where), **answers}


def _is_answer(message: Message) -> bool:
    return message.get("role") in ("assistant", "tool")


def _shared(sides: dict[str, list[Message]]) -> list[Message]:
    """Return the turns before the answers: those that both sides share, or those before the first answer."""
    if "chosen" in sides:
        return extract_prompt(sides)["prompt"]
    return list(takewhile(lambda turn: not _is_answer(turn), sides["completion"]))


def _asked(given: Row, where: str) -> list[Message]:
    """Return the turns of a prompt without its system turn."""
    turns = []
    for exchange in given.get("history") or []:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise HFTError(f"{where}, history holds {exchange!r:.80}: give lists of a question and its answer.")
        turns += conversation(exchange[0], "user", where) + conversation(exchange[1], "assistant", where)
    question = given.get("prompt")
    if isinstance(question, str) and given.get("context"):
        question = "\n\n".join(part for part in (question, given["context"]) if part)
    if question:
        turns += conversation(question, "user", f"{where}, prompt")
    if turns and _is_answer(turns[-1]) and turns[-1].get("content") == "":
        turns.pop()  # hh-rlhf leaves the answer empty
    return turns


def _after_system(given: Row, turns: list[Message], where: str) -> list[Message]:
    if not given.get("system") or (turns and turns[0].get("role") == "system"):
        return turns
    return conversation(given["system"], "system", f"{where}, system") + turns


def _joined(asked: list[Message], repeated: list[Message], where: str) -> list[Message]:
    """Join a prompt and the turns that its answers repeat, so that each appears once."""
    if not asked or any(repeated[i : i + len(asked)] == asked for i in range(len(repeated))):
        return repeated
    overlap = max(n for n in range(len(repeated) + 1) if asked[len(asked) - n :] == repeated[:n])
    if repeated and not overlap and asked[-1].get("role") == repeated[0].get("role"):
        raise HFTError(
            f"{where}: the answers begin with {repeated[0]!r:.80}, which prompt does not end with: give only the "
            "answers, or put them after the prompt's own turns."
        )
    return asked + repeated[overlap:]


def conversation(value: Any, role: str, where: str) -> list[Message]:
    """
    Return a text of `role`, an hh-rlhf dialogue, one message or a list of them as messages.

    Messages may have ShareGPT's fields and roles. Only the fields that chat templates read are kept.
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
