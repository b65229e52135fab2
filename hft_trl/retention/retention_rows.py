"""Read the texts, facts and prompts that retention is measured on."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hft_trl.errors import HFTError, explained

Rows = str | Path | Sequence[Any]
"""A file, or its rows: strings, or mappings such as the rows of a [`~datasets.Dataset`]."""


def read_texts(source: Rows) -> list[str]:
    """Read plain text: a text file, or `.jsonl` rows with a `text`."""
    if isinstance(source, str | Path) and Path(source).suffix.lower() not in (".jsonl", ".json"):
        return [_content("texts", Path(source))]
    return _rows("texts", source, _text, "a string, or a mapping with a `text`")


def read_facts(source: Rows) -> list[dict[str, Any]]:
    """Read cloze facts: rows with a `text` to continue, its `answer`, and wrong answers in `others`."""
    return _rows(
        "facts", source, _fact, "a mapping with `text`, `answer` and a list `others` of wrong ones, not empty"
    )


def read_prompts(source: Rows) -> list[str | list[dict[str, Any]]]:
    """Read prompts: `.jsonl` rows with `messages`, or a `prompt` that is a string or messages."""
    return _rows("prompts", source, _prompt, "a string, or a mapping with `messages` or a `prompt`")


def choose(rows: Sequence[Any], most: int) -> list[Any]:
    """Choose at most `most` rows at equal distances, the same ones in every call."""
    number = min(most, len(rows))
    return [rows[i * len(rows) // number] for i in range(number)]


def _rows(name: str, source: Rows, read: Callable[[Any], Any], form: str) -> list[Any]:
    where = f"the rows of {name}" if not isinstance(source, str | Path) else f"{name} {str(source)!r}"
    rows = _parse(name, Path(source)) if isinstance(source, str | Path) else list(source)
    if not rows:
        raise HFTError(f"{where} are empty: give at least one row, or leave {name} out.")
    found = [read(row) for row in rows]
    if None in found:
        number = found.index(None)
        raise HFTError(f"row {number + 1} of {where} is {str(rows[number])[:80]!r}: each row must be {form}.")
    return found


def _parse(name: str, path: Path) -> list[Any]:
    lines = _content(name, path).split("\n")  # not splitlines, which also splits at line separators inside of strings
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise HFTError(f"{name} {str(path)!r} is not a JSON object per line: {explained(error)}.") from error


def _content(name: str, path: Path) -> str:
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise HFTError(f"{name} {str(path)!r} cannot be read: {explained(error)}.") from error
    if not text.strip():
        raise HFTError(f"{name} {str(path)!r} is empty: give a file with text, or leave {name} out.")
    return text


def _text(row: Any) -> str | None:
    text = row.get("text") if isinstance(row, Mapping) else row
    return text if isinstance(text, str) and text.strip() else None


def _fact(row: Any) -> dict[str, Any] | None:
    if not isinstance(row, Mapping) or not isinstance(row.get("others"), list | tuple):
        return None
    fact = {"text": row.get("text"), "answer": row.get("answer"), "others": list(row["others"])}
    strings = [fact["text"], fact["answer"], *fact["others"]]
    texts = all(isinstance(string, str) and string.strip() for string in strings)
    return fact if texts and {*fact["others"]} - {fact["answer"]} else None


def _prompt(row: Any) -> str | list[dict[str, Any]] | None:
    prompt = (row.get("messages") or row.get("prompt")) if isinstance(row, Mapping) else row
    if isinstance(prompt, str):
        return prompt if prompt.strip() else None
    chat = isinstance(prompt, Sequence) and prompt and all(isinstance(m, Mapping) and "role" in m for m in prompt)
    return [dict(message) for message in prompt] if chat else None
