"""Check that a chat template renders all rows, and writes everything that a model should learn from."""

import copy
import json
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational

from hft_trl.errors import HFTError, first_line
from hft_trl.recipe.layouts import ANSWERS, OPTIONAL
from hft_trl.recipe.messages import Message
from hft_trl.recipe.rows import for_each_row


def check_rendered(tokenizer: PreTrainedTokenizerBase, dataset: Dataset, name: str) -> None:
    """
    Check that a chat template renders the conversations of a data set and leaves nothing out.

    One row of each pattern (roles, empty contents, numbers of tool calls, tools) is rendered unchanged, and with marks
    instead of contents and function names, which must appear in the text. `name` is the data set's in errors.
    """
    if not is_conversational(dataset[0]):
        return
    columns = [column for column in ("messages", "prompt", *ANSWERS) if column in dataset.column_names]
    beside = [column for column in OPTIONAL if column in dataset.column_names]
    seen = set()

    def check(number: int, *values: Any) -> None:
        row = dict(zip([*columns, *beside], values, strict=True))
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        chats = [row["messages"]] if "messages" in row else [row["prompt"] + row[side] for side in columns[1:]]
        for messages in chats:
            turns = ((m["role"], bool(m["content"]), len(m.get("tool_calls") or [])) for m in messages)
            pattern = bool(tools), *turns
            if pattern not in seen:
                seen.add(pattern)
                settings = row.get("chat_template_kwargs") or {}
                _check_chat(tokenizer, messages, tools, settings, f"row {number} of {name}")

    for_each_row(check, dataset, *columns, *beside)


def _check_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[Any] | None,
    settings: dict[str, Any],
    where: str,
) -> None:
    settings = {"tokenize": False, **settings}
    marked = [_marked(message, turn) for turn, message in enumerate(messages)]
    try:
        tokenizer.apply_chat_template(messages, tools=tools, **settings)
        text = tokenizer.apply_chat_template(marked, tools=tools, **settings)
        without = tokenizer.apply_chat_template(marked, **settings) if tools else None
    except Exception as error:  # a template is a program, which can fail in any way
        raise HFTError(
            f"{where}: the chat template rejects it ({first_line(error)}): set chat_template to one that takes it, or "
            "change the row."
        ) from error
    left_out = "the tools" if text == without else _left_out(marked, text)
    if left_out is not None:
        raise HFTError(
            f"{where}: the chat template leaves out {left_out}, so the model would not learn from it: set "
            "chat_template to one that writes it, or change the row."
        )


def _marked(message: Message, turn: int) -> Message:
    marked = copy.deepcopy(message)
    if marked["content"]:
        marked["content"] = f"content-{turn}-marked"
    for i, call in enumerate(marked.get("tool_calls") or []):
        call.get("function", call)["name"] = f"call_{turn}_{i}_marked"
    return marked


def _left_out(marked: list[Message], text: str) -> str | None:
    for turn, message in enumerate(marked):
        calls = message.get("tool_calls") or []
        if any(call.get("function", call)["name"] not in text for call in calls):
            return f"the tool calls of message {turn}"
        # Some templates write no content beside a call (Llama 3.1)
        if not calls and message["content"] and message["content"] not in text:
            return f"message {turn}, of role {message['role']!r}"
    return None
