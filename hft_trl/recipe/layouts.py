"""Layouts of public data sets: find the columns of chats, prompts and answers, and convert them."""

from collections.abc import Collection
from functools import partial
from itertools import takewhile
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Features, Json, List, Value
from trl import extract_prompt
from trl.trainer.utils import remove_none_values

from hft_trl.errors import HFTError
from hft_trl.recipe.messages import ROLES, Message, conversation, is_dialogue

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

Row = dict[str, Any]


def find_parts(columns: Collection[str], preference: bool) -> dict[str, str]:
    """
    Find the column of each part of a row in pairs (`preference`), or in chats or completions.

    The parts are `chat`, or `prompt` and `completion`, or `chosen` and `rejected` and perhaps `prompt`, with `system`,
    `history` and `context` if they exist. The result is empty if no layout fits.
    """
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

    The columns become `messages`, or `prompt` and `completion`, or `prompt`, `chosen` and `rejected`. The prompt
    contains all turns before the answers once. Texts under TRL's names stay plain text.
    """
    if _is_in_form(dataset, parts):
        return dataset
    wanted = ("messages",) if "chat" in parts else ("prompt", *(side for side in ANSWERS if side in parts))
    features = {column: List(Json()) for column in wanted}
    for column in [column for column in OPTIONAL if column in dataset.column_names]:
        features[column] = dataset.features[column] if _is_text(dataset, column) else Json()
    # In Arrow's structs, missing keys are None. JSON tells null from missing.
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
    """Join a prompt and the turns that its answers repeat, so that each is there once."""
    if not asked or any(repeated[i : i + len(asked)] == asked for i in range(len(repeated))):
        return repeated
    overlap = max(n for n in range(len(repeated) + 1) if asked[len(asked) - n :] == repeated[:n])
    if repeated and not overlap and asked[-1].get("role") == repeated[0].get("role"):
        raise HFTError(
            f"{where}: the answers begin with {repeated[0]!r:.80}, which prompt does not end with: give only the "
            "answers, or put them after the prompt's own turns."
        )
    return asked + repeated[overlap:]
