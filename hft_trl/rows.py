"""The rows of a data set: checked one by one, and brought into the shape that TRL's trainers take."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from datasets.utils import tqdm
from trl import maybe_convert_to_chatml

from hft_trl.errors import HFTError, as_user_error

ROLES = ("system", "user", "assistant", "tool")


def sft_dataset(dataset: Dataset, name: str, text_field: str = "text") -> Dataset:
    """
    Check a data set for supervised fine-tuning and keep the columns that TRL reads.

    Args:
        dataset ([`~datasets.Dataset`]):
            Conversations in a `messages` column (Tülu V2: `dataset`, `id`, `messages`) or a `conversations` column,
            TRL's `prompt` and `completion`, or plain text.
        name (`str`):
            What errors call it.
        text_field (`str`, *optional*, defaults to `"text"`):
            The column that holds plain text.

    Returns:
        [`~datasets.Dataset`]: The same rows.

    Raises:
        [`HFTError`]: Naming the column or the first row that can't be trained on.
    """
    if "conversations" in dataset.column_names and "messages" not in dataset.column_names:
        with as_user_error(f"{name}, column conversations"), PartialState().main_process_first():
            dataset = dataset.map(
                maybe_convert_to_chatml, remove_columns="conversations", desc="Converting conversations"
            )
    columns = set(dataset.column_names)
    for wanted in ({"messages"}, {"prompt", "completion"}, {text_field}, {"input_ids"}):
        if wanted <= columns:
            break
    else:
        raise HFTError(
            f"{name} has the columns {sorted(columns)}: supervised fine-tuning takes messages, prompt and completion, or "
            f"{text_field}."
        )

    def check_conversation(row: int, messages: Any) -> None:
        _check_messages(messages, f"row {row} of {name}")
        _check_answered(messages, f"row {row} of {name}")

    def check_completion(row: int, prompt: Any, completion: Any) -> None:
        _check_completed(prompt, completion, f"row {row} of {name}", "completion")

    def check_text(row: int, text: Any) -> None:
        if not isinstance(text, str) or not text:
            raise HFTError(f"row {row} of {name}, {text_field} is {text!r}: it must be text, and not empty.")

    if wanted == {"messages"}:
        _for_each_row(check_conversation, dataset, "messages")
    elif wanted == {"prompt", "completion"}:
        _for_each_row(check_completion, dataset, "prompt", "completion")
    elif wanted == {text_field}:
        _for_each_row(check_text, dataset, text_field)
    optional = {"tools", "chat_template_kwargs", "labels", "completion_mask", "assistant_masks"}
    return dataset.select_columns([column for column in dataset.column_names if column in wanted | optional])


def preference_dataset(dataset: Dataset, name: str, drop_equal_pairs: bool = False) -> Dataset:
    """
    Check a data set of preference pairs and bring it into the shape that TRL reads.

    Args:
        dataset ([`~datasets.Dataset`]):
            `chosen` and `rejected`, as lists of messages or as text, and optionally `prompt`. UltraFeedback binarized
            repeats its `prompt` as text beside whole conversations; it is left out there, since TRL takes the prompt
            from what the two conversations share. A `prompt` as text beside answers alone becomes their user's turn.
        name (`str`):
            What errors call it.
        drop_equal_pairs (`bool`, *optional*, defaults to `False`):
            Whether to drop pairs whose sides are equal rather than to refuse them.

    Returns:
        [`~datasets.Dataset`]: The rows in TRL's shape.

    Raises:
        [`HFTError`]: Naming the column or the first row that can't be trained on.
    """
    columns = set(dataset.column_names)
    if not {"chosen", "rejected"} <= columns:
        raise HFTError(f"{name} has the columns {sorted(columns)}: preference training takes chosen and rejected.")
    if "prompt" in columns and isinstance(dataset[0]["prompt"], str) and isinstance(dataset[0]["chosen"], list):
        if dataset[0]["chosen"] and dataset[0]["chosen"][0].get("role") == "assistant":
            with PartialState().main_process_first():
                dataset = dataset.map(_as_users_turn, desc="Converting prompts")
        else:
            dataset = dataset.remove_columns("prompt")
    explicit = "prompt" in dataset.column_names
    wanted = (["prompt"] if explicit else []) + ["chosen", "rejected"]
    equal = set()

    def check_pair(row: int, *values: Any) -> None:
        *prompt, chosen, rejected = values
        where = f"row {row} of {name}"
        for side, answer in (("chosen", chosen), ("rejected", rejected)):
            _check_completed(prompt[0] if explicit else type(chosen)(), answer, where, side)
        if chosen == rejected:
            if not drop_equal_pairs:
                raise HFTError(
                    f"{where}: chosen and rejected are equal, so there is nothing to prefer: remove the row, or set "
                    "drop_equal_pairs."
                )
            equal.add(row)
        elif not explicit and isinstance(chosen, list) and chosen[0] != rejected[0]:
            raise HFTError(f"{where}: chosen and rejected begin with different turns, so they share no prompt.")

    _for_each_row(check_pair, dataset, *wanted)
    if len(equal) == len(dataset):
        raise HFTError(f"{name}: chosen and rejected are equal in every row, so there is nothing to prefer.")
    if equal:
        dataset = dataset.select([row for row in range(len(dataset)) if row not in equal])
    optional = {"tools", "chat_template_kwargs"}
    return dataset.select_columns([column for column in dataset.column_names if column in {*wanted, *optional}])


def _for_each_row(check: Callable[..., None], dataset: Dataset, *columns: str) -> None:
    """Call `check` with each row's number and values, a batch in memory at a time, and show how far it is."""
    # No PartialState here: the first one decides on devices, which is for the trainer's arguments to say.
    row, quiet = 0, os.environ.get("LOCAL_RANK", "0") != "0"
    with tqdm(total=len(dataset), desc="Checking rows", unit=" examples", disable=quiet) as bar:
        for batch in dataset.select_columns(list(columns)).iter(batch_size=1000):
            for values in zip(*(batch[column] for column in columns), strict=True):
                check(row, *values)
                row += 1
            bar.update(len(batch[columns[0]]))


def _as_users_turn(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": row["prompt"]}]}


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise HFTError(
            f"{where} is {messages!r}: give a list of messages such as {{'role': 'user', 'content': '...'}}."
        )
    for turn, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise HFTError(f"{where}, message {turn} is {message!r}: give it a role and a content.")
        if message["role"] not in ROLES:
            raise HFTError(f"{where}, message {turn} has role {message['role']!r}: the roles are {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            raise HFTError(f"{where}, message {turn} has content {message['content']!r}: it must be text.")


def _check_answered(messages: list[Mapping[str, Any]], where: str) -> None:
    if all(message["role"] != "assistant" for message in messages):
        raise HFTError(f"{where} has no assistant turn, so there is nothing to learn: remove the row.")


def _check_completed(prompt: Any, answer: Any, where: str, side: str) -> None:
    """Check a prompt and what follows it: both text, or both messages that end with the assistant."""
    if isinstance(prompt, list) and isinstance(answer, list):
        if prompt:
            _check_messages(prompt, f"{where}, prompt")
        _check_messages(answer, f"{where}, {side}")
        _check_answered(answer, f"{where}, {side}")
        if answer[-1]["role"] != "assistant":
            raise HFTError(f"{where}, {side} ends with role {answer[-1]['role']!r}: it must be the assistant.")
    elif not isinstance(prompt, str) or not isinstance(answer, str) or not answer:
        raise HFTError(
            f"{where}: {side} is {answer!r:.80} and its prompt {prompt!r:.80}: give text, or lists of messages, on both sides."
        )


def untrained_rows(rows: int, prepared: Dataset, name: str, max_length: int | None, packing: bool = False) -> int:
    """
    Count the rows that are left without a token to train on after truncation.

    Args:
        rows (`int`):
            Number of rows before the trainer prepared them.
        prepared ([`~datasets.Dataset`]):
            The trainer's `train_dataset`. TRL drops rows without a trained token; when packing it keeps them, so they
            are counted inside the packs. The strategy `"wrapped"` cuts rows anywhere and drops nothing.
        name (`str`):
            What the error calls the data set.
        max_length (`int`, *optional*):
            The length in tokens that rows were truncated to.
        packing (`bool`, *optional*, defaults to `False`):
            Whether the trainer packed the rows.

    Raises:
        [`HFTError`]: If no row is left.
    """
    if "seq_lengths" in prepared.column_names:
        lost = 0
        for batch in prepared.select_columns(["labels", "seq_lengths"]).with_format("numpy").iter(batch_size=1000):
            # How many trained tokens stand before each token, so that a row has the difference of two of them.
            before = np.append(0, np.cumsum(np.concatenate(list(batch["labels"])) != -100))
            ends = np.cumsum(np.concatenate(list(batch["seq_lengths"])))
            lost += int(np.sum(np.diff(before[ends], prepend=0) == 0))
    elif packing:
        batches = prepared.select_columns("labels").with_format("numpy").iter(batch_size=1000)
        lost = rows * all(np.all(np.concatenate(list(batch["labels"])) == -100) for batch in batches)
    else:
        lost = rows - len(prepared)
    if lost >= rows:
        raise HFTError(
            f"none of the {rows} rows of {name} has a token to train on within max_length {max_length}: raise max_length."
        )
    return lost
