"""From a prompt and its answer to tokens: one text with no template, cut from the left, with the loss on answer and end."""

from collections.abc import Iterable, Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hft_trl.continual.tasks import Row
from hft_trl.errors import HFTError


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Check that a tokenizer has a token that ends an answer.

    Raises:
        [`HFTError`]: If it has none.
    """
    if tokenizer.eos_token_id is None:
        raise HFTError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token, so answers would never end: set "
            "its eos_token and save it."
        )


def encode(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None, num_proc: int | None = None
) -> tuple[Dataset, int]:
    """
    Encode rows to learn from as TRACE does: prompt, answer and end-of-sequence token, with the loss on the last two.

    TRL cuts on the right, which would lose the answer, and deprecates its way to cut on the left.

    Args:
        rows (`Iterable[Row]`):
            Prompts with their answers.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer, which puts its special tokens in front of a text.
        max_length (`int`, *optional*):
            Longest row, in tokens. `None` cuts nothing.
        num_proc (`int`, *optional*):
            Number of processes.

    Returns:
        `tuple[Dataset, int]`: `input_ids` and `labels` (-100 where there is no loss), and how many rows were cut.
    """

    def tokens(row: dict[str, str]) -> dict[str, list[int] | bool]:
        text = row["prompt"] + row["answer"]
        prompt, whole = _without_end(tokenizer, [_question(row["prompt"]), text])
        whole = [*whole, tokenizer.eos_token_id]
        # A token may reach over the border of the two: it belongs to the answer then.
        start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        labels = [-100] * start + whole[start:]
        cut = max_length is not None and len(whole) > max_length
        if cut:
            whole, labels = whole[-max_length:], labels[-max_length:]
        return {"input_ids": whole, "labels": labels, "cut": cut}

    # Of the rows and not of a file of them: its reader would take answers such as 2026-01-31 for dates.
    dataset = Dataset.from_list([row._asdict() for row in rows])
    encoded = dataset.map(
        tokens, remove_columns=dataset.column_names, num_proc=num_proc, desc="Tokenizing prompts and answers"
    )
    return encoded.remove_columns("cut"), sum(encoded["cut"])


def encode_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[list[list[int]], int]:
    """
    Encode prompts to be answered.

    Args:
        prompts (`Sequence[str]`):
            The prompts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        max_length (`int`, *optional*):
            Longest prompt, in tokens. `None` cuts nothing.

    Returns:
        `tuple[list[list[int]], int]`: Token ids by prompt, and how many prompts were cut from the left.
    """
    rows = _without_end(tokenizer, [_question(prompt) for prompt in prompts])
    if max_length is None:
        return rows, 0
    return [row[-max_length:] for row in rows], sum(len(row) > max_length for row in rows)


def _question(prompt: str) -> str:
    """A prompt as a model is asked: tokens begin with a space, so one at the end of a prompt belongs to the answer."""
    return prompt.rstrip(" ")


def _without_end(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids by text, without the end-of-sequence token that some tokenizers put behind every text."""
    rows = tokenizer(list(texts))["input_ids"]
    return [row[:-1] if row and row[-1] == tokenizer.eos_token_id else row for row in rows]
