"""Check the rows of a data set and how a chat template renders them, and convert them to TRL's form."""

import copy
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
from datasets import Dataset, Value
from datasets.utils import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import is_conversational

from hft_trl.errors import HFTError, first_line, speaks
from hft_trl.recipe.layouts import ANSWERS, OPTIONAL, Message, check_messages, find_parts, read_conversations

logger = logging.get_logger(__name__)

TOKENIZED = ("input_ids", "labels", "completion_mask", "assistant_masks")


def sft_dataset(dataset: Dataset, name: str, text_field: str = "text") -> Dataset:
    """Return rows for SFT in TRL's form, without those of empty answers. Errors name the data set."""
    columns = set(dataset.column_names)
    parts = find_parts(columns, preference=False)
    if _is_labelled(dataset):
        raise HFTError(
            f"{name} has a label for each completion, good or bad: keep the rows whose label is true, and remove the "
            "column."
        )
    if text_field in columns and "chat" not in parts and not {"prompt", "completion"} <= columns:
        parts = {}
    if parts:
        wanted = ["messages"] if "chat" in parts else ["prompt", "completion"]
    elif text_field in columns:
        wanted = [text_field]
    elif "input_ids" in columns:
        first = dataset[0]["input_ids"]
        if not isinstance(first, list) or not all(isinstance(token, int) for token in first):
            raise HFTError(f"row 0 of {name}, input_ids is {first!r:.80}: it must be a list of token numbers.")
        _name_unused(dataset, TOKENIZED, name)
        return _kept(dataset, TOKENIZED)
    else:
        raise HFTError(
            f"{name} has the columns {sorted(columns)}: supervised fine-tuning takes messages, prompt and completion, "
            f"or {text_field}. Rename the columns that hold them."
        )
    _name_unused(dataset, parts.values() or wanted, name)
    dataset = read_conversations(dataset, parts, name) if parts else dataset
    empty = set()

    def check(row: int, *values: Any) -> None:
        where = f"row {row} of {name}"
        if "chat" in parts:
            check_messages(values[0], where)
            _check_answered(values[0], where)
        elif parts:
            _check_completed(*values, where, "completion")
        elif not isinstance(values[0], str):
            raise HFTError(f"{where}, {text_field} is {values[0]!r:.80}: it must be text.")
        if _is_empty(values[-1]):
            empty.add(row)

    for_each_row(check, dataset, *wanted)
    return _kept(dataset, wanted, empty, name, "only empty answers" if parts else f"an empty {text_field}")


def preference_dataset(dataset: Dataset, name: str, drop_equal_pairs: bool = False) -> Dataset:
    """Return preference pairs in TRL's form, without those whose chosen side is empty."""
    parts = find_parts(dataset.column_names, preference=True)
    if not parts and _is_labelled(dataset):
        raise HFTError(
            f"{name} has a label for each completion, good or bad, but a recipe reads pairs: give a good answer as "
            "chosen and a bad one as rejected, or train on single answers in a script of your own."
        )
    if not parts:
        raise HFTError(
            f"{name} has the columns {sorted(dataset.column_names)}: preference training takes chosen and rejected. "
            "Rename the columns that hold the better and the worse answer."
        )
    _name_unused(dataset, parts.values(), name)
    dataset = read_conversations(dataset, parts, name)
    explicit = ["prompt"] if "prompt" in dataset.column_names else []
    dropped = set()

    def check_pair(row: int, *values: Any) -> None:
        *prompt, chosen, rejected = values
        where = f"row {row} of {name}"
        for side, answer in (("chosen", chosen), ("rejected", rejected)):
            _check_completed(prompt[0] if explicit else "", answer, where, side)
        if _is_empty(chosen) or (drop_equal_pairs and chosen == rejected):
            dropped.add(row)
        elif chosen == rejected:
            raise HFTError(
                f"{where}: chosen and rejected are equal, so there is nothing to prefer: remove the row, or set "
                "drop_equal_pairs."
            )
        elif not explicit and rejected[:1] != chosen[:1]:
            raise HFTError(f"{where}: chosen and rejected begin differently, and there is no column prompt: add one.")

    wanted = [*explicit, "chosen", "rejected"]
    for_each_row(check_pair, dataset, *wanted)
    return _kept(dataset, wanted, dropped, name, "an empty chosen side" + " or equal sides" * drop_equal_pairs)


def _is_labelled(dataset: Dataset) -> bool:
    """Return whether rows are single answers with a verdict, as KTO takes them."""
    parts = find_parts(dataset.column_names, preference=False)
    return "completion" in parts and dataset.features.get("label") == Value("bool")


def _name_unused(dataset: Dataset, used: Iterable[str], name: str) -> None:
    unused = [column for column in dataset.column_names if column not in {*used, *OPTIONAL}]
    if unused and speaks():
        logger.warning(f"{name}: the columns {', '.join(unused)} are not used.")


def _kept(
    dataset: Dataset, wanted: Iterable[str], dropped: Collection[int] = (), name: str = "", what: str = ""
) -> Dataset:
    """Return the columns that TRL reads, without the `dropped` rows, which a warning counts."""
    dataset = dataset.select_columns([column for column in dataset.column_names if column in {*wanted, *OPTIONAL}])
    if not dropped:
        return dataset
    if len(dropped) == len(dataset):
        raise HFTError(f"every row of {name} has {what}, so there is nothing to learn: give rows with answers.")
    if speaks():
        logger.warning(f"{len(dropped):,} of {len(dataset):,} rows of {name} have {what}: left out.")
    return dataset.select([row for row in range(len(dataset)) if row not in dropped])


def _is_empty(answer: str | list[Message]) -> bool:
    if isinstance(answer, str):
        return not answer.strip()
    answers = [message for message in answer if message["role"] == "assistant"]
    return not any(message["content"].strip() or message.get("tool_calls") for message in answers)


def for_each_row(check: Callable[..., None], dataset: Dataset, *columns: str) -> None:
    """Call `check` with each row's number and values, with one batch in memory and a progress bar."""
    batches = dataset.select_columns(list(columns)).iter(batch_size=1000)
    rows = (values for batch in batches for values in zip(*(batch[column] for column in columns), strict=True))
    # Closed before an error is printed
    with tqdm(rows, total=len(dataset), desc="Checking rows", unit=" examples", disable=not speaks()) as bar:
        for row, values in enumerate(bar):
            check(row, *values)


def _check_answered(messages: list[Message], where: str) -> None:
    if all(message["role"] != "assistant" for message in messages):
        raise HFTError(f"{where} has no assistant turn, so there is nothing to learn: remove the row.")


def _check_completed(prompt: Any, answer: Any, where: str, side: str) -> None:
    """Check that a prompt and its answer are both text, or both messages that end with the assistant."""
    if isinstance(prompt, list) and isinstance(answer, list):
        if not prompt:
            raise HFTError(
                f"{where}: {side} is {answer!r:.80} and there is no prompt: give one, or begin both sides with it."
            )
        _check_answered(answer, f"{where}, {side}")
        for verb, message in (("continues its prompt", answer[0]), ("ends", answer[-1])):
            if message["role"] != "assistant" and not (message is answer[0] and message["role"] == "tool"):
                raise HFTError(f"{where}, {side} {verb} with role {message['role']!r}: it must be the assistant.")
    elif not isinstance(prompt, str) or not isinstance(answer, str):
        raise HFTError(
            f"{where}: {side} is {answer!r:.80} and its prompt {prompt!r:.80}: give text, or lists of messages, on "
            "both sides."
        )
    elif answer.startswith("\n\nHuman:"):  # of Anthropic/hh-rlhf
        raise HFTError(
            f"{where}: {side} is a dialogue in one text: give lists of messages, as trl-lib/hh-rlhf-helpful-base has."
        )


def untrained_rows(
    rows: int, prepared: Dataset, name: str, max_length: int | None, packing: bool | None = None
) -> int:
    """Count the rows without a token to train on after truncation. Reject a data set of only such rows."""
    lost = max(0, rows - len(prepared))  # a user's own trainer may make more
    if packing:  # TRL drops such rows, but keeps them inside packs, where they are not counted
        batches = prepared.select_columns("labels").with_format("numpy").iter(batch_size=1000)
        lost = rows * all(np.all(np.concatenate(list(batch["labels"])) == -100) for batch in batches)
    if lost >= rows:
        raise HFTError(
            f"none of the {rows} rows of {name} has a token to train on within max_length {max_length}: raise "
            "max_length."
        )
    return lost


def check_rendered(tokenizer: PreTrainedTokenizerBase, dataset: Dataset, name: str) -> None:
    """Check that a chat template renders a row of each pattern of turns, and leaves nothing out."""
    if not is_conversational(dataset[0]):
        return
    columns = [column for column in ("messages", "prompt", *ANSWERS, *OPTIONAL) if column in dataset.column_names]
    seen = set()

    def check(number: int, *values: Any) -> None:
        row = dict(zip(columns, values, strict=True))
        sides = ["messages"] if "messages" in row else [side for side in ANSWERS if side in row]
        for messages in (row.get("prompt", []) + row[side] for side in sides):
            turns = ((m["role"], bool(m["content"]), len(m.get("tool_calls") or [])) for m in messages)
            pattern = bool(row.get("tools")), *turns
            if pattern not in seen:
                seen.add(pattern)
                where, kwargs = f"row {number} of {name}", row.get("chat_template_kwargs") or {}
                _check_chat(tokenizer, messages, where, row.get("tools"), kwargs)

    for_each_row(check, dataset, *columns)


def _check_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, tools: Any, kwargs: dict[str, Any]
) -> None:
    marked, expected = copy.deepcopy(messages), {}
    for turn, message in enumerate(marked):
        calls = message.get("tool_calls") or []
        for number, call in enumerate(calls):
            call["function"]["name"] = mark = f"call_{turn}_{number}_marked"
            expected[mark] = f"the tool calls of message {turn}"
        if message["content"]:
            message["content"] = mark = f"content-{turn}-marked"
            if not calls:  # some templates write no content beside a call (Llama 3.1)
                expected[mark] = f"message {turn}, of role {message['role']!r}"
    try:
        settings = {"tokenize": False, **kwargs}
        tokenizer.apply_chat_template(messages, tools=tools, **settings)
        text = tokenizer.apply_chat_template(marked, tools=tools, **settings)
        without = tokenizer.apply_chat_template(marked, **settings) if tools else None
    except Exception as error:  # a template is a program, which can fail in any way
        raise HFTError(
            f"{where}: the chat template rejects it ({first_line(error)}): set chat_template to one that takes it, or "
            "change the row."
        ) from error
    left_out = [what for mark, what in expected.items() if mark not in text] + ["the tools"] * (text == without)
    if left_out:
        raise HFTError(
            f"{where}: the chat template leaves out {left_out[0]}, so the model would not learn from it: set "
            "chat_template to one that writes it, or change the row."
        )
