"""What a chat template makes of rows: it has to take them, and to write all that a model should learn from."""

import json
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational

from hft_trl.errors import HFTError, first_line
from hft_trl.recipe.layouts import ANSWERS
from hft_trl.recipe.messages import Message
from hft_trl.recipe.rows import for_each_row


def check_rendered(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, name: str, template: str | None = None
) -> None:
    """
    Check that a chat template takes the conversations of a data set, and leaves nothing of them out.

    One row of each pattern (roles, empty contents, numbers of tool calls, tools) is rendered, as it is and with marks in place of
    contents and of the called functions' names, which have to be found in the text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            With a chat template.
        dataset ([`~datasets.Dataset`]):
            Rows in TRL's form. Plain text is not looked at.
        name (`str`):
            What errors call the data set.
        template (`str`, *optional*):
            The template, if it is not the tokenizer's own.

    Raises:
        [`HFTError`]: Naming the first row that the template refuses, or of which it leaves out a message, a tool call or the tools.
    """
    if not is_conversational(dataset[0]):
        return
    columns = [column for column in ("messages", "prompt", *ANSWERS) if column in dataset.column_names]
    beside = [column for column in ("tools", "chat_template_kwargs") if column in dataset.column_names]
    seen = set()

    def check(number: int, *values: Any) -> None:
        row = dict(zip([*columns, *beside], values, strict=True))
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        settings = {"chat_template": template, "tokenize": False, **(row.get("chat_template_kwargs") or {})}
        for messages in (
            [row["messages"]] if "messages" in row else [row["prompt"] + row[side] for side in columns[1:]]
        ):
            pattern = (
                bool(tools),
                *((m["role"], bool(m["content"]), len(m.get("tool_calls") or [])) for m in messages),
            )
            if pattern in seen:
                continue
            seen.add(pattern)
            where = f"row {number} of {name}"
            try:
                tokenizer.apply_chat_template(messages, tools=tools, **settings)
                marked = [_marked(message, turn) for turn, message in enumerate(messages)]
                text = tokenizer.apply_chat_template(marked, tools=tools, **settings)
                without = tokenizer.apply_chat_template(marked, **settings) if tools else None
            except Exception as error:  # a template is a program, which can fail in any way
                raise HFTError(
                    f"{where}: the chat template refuses it ({first_line(error)}): set chat_template to one that takes it, or "
                    "change the row."
                ) from error
            left_out = "the tools" if text == without else _left_out(marked, text)
            if left_out is not None:
                raise HFTError(
                    f"{where}: the chat template leaves out {left_out}, so the model would not learn from it: set chat_template to one "
                    "that writes it, or change the row."
                )

    for_each_row(check, dataset, *columns, *beside)


def _marked(message: Message, turn: int) -> Message:
    marked = dict(message)
    if message["content"]:
        marked["content"] = f"content-{turn}-marked"
    if message.get("tool_calls"):
        marked["tool_calls"] = [
            _renamed(call, f"call_{turn}_{i}_marked") for i, call in enumerate(message["tool_calls"])
        ]
    return marked


def _renamed(call: dict[str, Any], name: str) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}


def _left_out(marked: list[Message], text: str) -> str | None:
    for turn, message in enumerate(marked):
        calls = message.get("tool_calls") or []
        if any(call.get("function", call)["name"] not in text for call in calls):
            return f"the tool calls of message {turn}"
        # Some templates write no content beside a call (Llama 3.1), and all that answers need is the call
        if not calls and message["content"] and message["content"] not in text:
            return f"message {turn}, of role {message['role']!r}"
    return None
