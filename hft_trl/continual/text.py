"""From a prompt and its answer to tokens: one text with no template, cut from the left, with the loss on answer and end."""

from collections.abc import Sequence

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase


def encode(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, num_proc: int | None = None
) -> tuple[Dataset, int]:
    """
    Encode rows to learn from as TRACE does: prompt, answer and end-of-sequence token, with the loss on the last two.

    TRL cuts on the right, which would lose the answer, and deprecates its way to cut on the left.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and `completion`, both text.
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
        whole = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
        prompt = tokenizer(row["prompt"])["input_ids"]
        # A token may reach over the border of the two: it belongs to the answer then.
        start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        labels = [-100] * start + whole[start:]
        cut = max_length is not None and len(whole) > max_length
        if cut:
            whole, labels = whole[-max_length:], labels[-max_length:]
        return {"input_ids": whole, "labels": labels, "cut": cut}

    with PartialState().main_process_first():
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
    rows = tokenizer(list(prompts))["input_ids"]
    if max_length is None:
        return rows, 0
    return [row[-max_length:] for row in rows], sum(len(row) > max_length for row in rows)
