"""Greedy replies of a model, in its chat form or as plain continuations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hft_trl.chat import prompt_ids
from hft_trl.errors import HFTError


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


@contextmanager
def _generating_by(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Nothing of the model's own settings, which `generate` would mix in: some models ship a repetition penalty."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    batch_size: int = 256,
    progress: bool = False,
) -> list[str]:
    """
    Greedy replies to one-turn prompts, asked with the tokenizer's chat template, or with Tülu's where it has none.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, on any device. Its training mode is left as it was.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a padding token.
        prompts (`Sequence[str]`):
            What the user says.
        max_new_tokens (`int`, *optional*, defaults to `32`):
            Longest reply, in tokens; a reply also ends with the model's positions.
        batch_size (`int`, *optional*, defaults to `256`):
            Prompts in a batch.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar on standard error.

    Returns:
        `list[str]`: The replies, without special tokens.

    Raises:
        [`HFTError`]: If the template refuses a prompt, or a prompt alone fills the model's positions.
    """
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    return complete(model, tokenizer, rows, max_new_tokens, batch_size, progress)


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int = 32,
    batch_size: int = 256,
    progress: bool = False,
) -> list[str]:
    """
    What a model greedily writes after rows of tokens, whatever its generation config says besides the tokens that end a turn.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, on any device. Its training mode is left as it was.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a padding token.
        rows (`Sequence[Sequence[int]]`):
            Token ids, one row for each continuation, of any lengths.
        max_new_tokens (`int`, *optional*, defaults to `32`):
            Longest continuation, in tokens.
        batch_size (`int`, *optional*, defaults to `256`):
            Rows in a batch.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar on standard error.

    Returns:
        `list[str]`: The continuations, without special tokens and the white space around them.

    Raises:
        [`HFTError`]: If a row alone fills the model's positions.
    """
    positions, longest = most_tokens(model), max(map(len, rows), default=0)
    if positions is not None and longest >= positions:
        raise HFTError(f"a prompt has {longest} tokens, and the model {positions} positions: leave that prompt out.")
    # Like lengths side by side need little padding.
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    # Some models end a turn with another token than a text, and say so in their generation config only.
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    settings = GenerationConfig(
        do_sample=False,
        eos_token_id=[end for end in dict.fromkeys([tokenizer.eos_token_id, *ends]) if end is not None],
        pad_token_id=tokenizer.pad_token_id,
    )
    replies = [""] * len(rows)
    with evaluating(model), _generating_by(model, settings):
        for i in logging.tqdm(range(0, len(order), batch_size), desc="Replies", disable=not progress):
            chosen = order[i : i + batch_size]
            width = max(len(rows[j]) for j in chosen)
            padding = [width - len(rows[j]) for j in chosen]
            ids = [[tokenizer.pad_token_id] * pad + list(rows[j]) for j, pad in zip(chosen, padding, strict=True)]
            mask = [[0] * pad + [1] * (width - pad) for pad in padding]
            most = max_new_tokens if positions is None else min(max_new_tokens, positions - width)
            settings.max_new_tokens = most
            generated = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=settings,
            )
            texts = tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
            for j, text in zip(chosen, texts, strict=True):
                replies[j] = text.strip()
    return replies


def most_tokens(model: PreTrainedModel) -> int | None:
    """How many tokens a model can take, `None` for those without a limit (state spaces)."""
    config = model.config.get_text_config()
    return config.max_position_embeddings if hasattr(config, "max_position_embeddings") else None
