"""Tokenize prompts and answers: no template, truncation from the left, loss on the answer."""

from collections.abc import Iterable, Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hft_trl.continual.tasks import Row
from hft_trl.errors import HFTError


def encode(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None, num_proc: int | None = None
) -> tuple[Dataset, int]:
    """
    Encode rows as TRACE does: prompt, answer and end token, truncated from the left, unlike in TRL.

    Return `input_ids` and `labels` (-100 without a loss), and the number of truncated rows.
    """
    if tokenizer.eos_token_id is None:
        raise HFTError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token, so answers would never end: "
            "set its eos_token and save it."
        )

    def tokens(row: dict[str, str]) -> dict[str, list[int] | bool]:
        prompt, whole = _without_end(tokenizer, [_question(row["prompt"]), row["prompt"] + row["answer"]])
        whole = [*whole, tokenizer.eos_token_id]
        # A token that spans prompt and answer belongs to the answer
        start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        labels = [-100] * start + whole[start:]
        kept = slice(0 if max_length is None else -max_length, None)
        return {"input_ids": whole[kept], "labels": labels[kept], "cut": len(whole[kept]) < len(whole)}

    # From the rows and not from a JSON file, whose reader would parse answers such as 2026-01-31 as dates
    dataset = Dataset.from_list([row._asdict() for row in rows])
    encoded = dataset.map(
        tokens, remove_columns=dataset.column_names, num_proc=num_proc, desc="Tokenizing prompts and answers"
    )
    return encoded.remove_columns("cut"), sum(encoded["cut"])


def encode_prompts(
    prompts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[list[list[int]], int]:
    """Encode prompts for generation. Return the token ids of each, and the number of truncated prompts."""
    rows = _without_end(tokenizer, [_question(prompt) for prompt in prompts])
    if max_length is None:
        return rows, 0
    return [row[-max_length:] for row in rows], sum(len(row) > max_length for row in rows)


def _question(prompt: str) -> str:
    """Remove spaces at the end of a prompt: tokens begin with a space, so these belong to the answer."""
    return prompt.rstrip(" ")


def _without_end(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenize texts without the end-of-sequence token that some tokenizers append to each text."""
    rows = tokenizer(list(texts))["input_ids"]
    return [row[:-1] if row and row[-1] == tokenizer.eos_token_id else row for row in rows]
