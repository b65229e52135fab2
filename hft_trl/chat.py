"""Tokenizers and their chat templates, and greedy replies of a model."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from hft_trl.errors import HFTError, first_line


@cache
def tulu_template(bos: bool = False) -> str:
    """Return Tülu's chat template with generation markers. With `bos` a chat begins with the BOS token."""
    template = files("hft_trl").joinpath("tulu.jinja").read_text(encoding="utf-8")
    return "{{- bos_token -}}\n" + template if bos else template


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer starts plain text with its BOS token, as Llama's does, unlike Qwen's."""
    return tokenizer.bos_token_id is not None and tokenizer("text")["input_ids"][:1] == [tokenizer.bos_token_id]


def load_tokenizer(
    model: str, template: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer that has a chat template.

    `template` is `"tulu"` or a `.jinja` file, by default the tokenizer's own, and Tülu's if it has none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        tokenizer("text")  # damaged files may load
    except Exception as error:  # the tokenizers library raises plain `Exception` for damaged files
        remedy = "save the one that belongs to the model in this folder" if Path(model).is_dir() else first_line(error)
        raise HFTError(f"no tokenizer was found for {model!r}: {remedy}") from error
    set_template(tokenizer, template)
    return tokenizer


def set_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Give a tokenizer the chat template of [`load_tokenizer`]."""
    if template is not None and template != "tulu":
        if not Path(template).is_file():
            raise HFTError(f"chat_template is {template!r}: give 'tulu' or the path of a .jinja file.")
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise HFTError(f"chat_template {template!r} cannot be read: {first_line(error)}.") from error
    elif template == "tulu" or tokenizer.chat_template is None:
        tokenizer.chat_template = tulu_template(begins_with_bos(tokenizer))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Tokenize a one-turn prompt in the tokenizer's chat template, or in Tülu's if it has none."""
    template = tokenizer.chat_template or tulu_template(begins_with_bos(tokenizer))
    settings = {"chat_template": template, "add_generation_prompt": True, "return_dict": False}
    try:
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **settings)
    except Exception as error:  # a template can raise any exception
        raise HFTError(
            f"the chat template of {tokenizer.name_or_path!r} rejects a prompt ({first_line(error)}): set "
            "chat_template to another one, such as 'tulu'."
        ) from error


# How templates in ChatML write a turn, such as SmolLM2's. TRL knows only some of them, by their complete text.
CHATML_TURN = re.compile(
    r"""(\{\{-?)\s*'<\|im_start\|>'\s*\+\s*message\['role'\]\s*\+\s*'(\n|\\n)'\s*\+\s*message\['content'\]\s*"""
    r"""\+\s*'<\|im_end\|>'\s*\+\s*'(?:\n|\\n)'\s*(-?\}\})"""
)


def _marked_turn(turn: re.Match[str]) -> str:
    """Split the expression of a turn, so that an answer and its end token lie between markers."""
    start, newline, end = turn.groups()
    text = "{{ message['content'] + '<|im_end|>' }}"
    answer = f"{{% generation %}}{text}{{% endgeneration %}}"
    return (
        f"{start} '<|im_start|>' + message['role'] + '{newline}' }}}}"
        f"{{% if message['role'] == 'assistant' %}}{answer}{{% else %}}{text}{{% endif %}}"
        f"{{{{ '{newline}' {end}"
    )


def mark_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Give a ChatML template the generation markers that it lacks, with which it renders the same text.

    Templates that have markers, or of which TRL knows a version with markers, stay. Others raise an [`HFTError`].
    """
    if has_generation_markers(tokenizer.chat_template):
        return
    try:
        get_training_chat_template(tokenizer)
    except ValueError as error:
        template = tokenizer.chat_template
        marked, turns = CHATML_TURN.subn(_marked_turn, template) if isinstance(template, str) else (template, 0)
        if turns != 1:
            raise HFTError(
                f"the chat template of {tokenizer.name_or_path!r} has no {{% generation %}} markers, which "
                "assistant_only_loss needs: set chat_template to 'tulu', or assistant_only_loss to false."
            ) from error
        tokenizer.chat_template = marked


def check_ids(prepared: Dataset, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, model: str) -> None:
    """
    Reject rows and special tokens for which the model has no embedding. `model` is for the error.

    A tokenizer may have more tokens than its model if they are never used (Gemma 3 1B has one for images).
    """
    rows = config.get_text_config().vocab_size
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    lowest, largest = 0, max(token or 0 for token in special)
    columns = [column for column in prepared.column_names if column.endswith("_ids")]
    for batch in prepared.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for column in columns:
            ids = batch[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            lowest, largest = int(ids.min(initial=lowest)), int(ids.max(initial=largest))
    if lowest < 0:
        raise HFTError(f"a row has the token number {lowest}: numbers start at 0; -100 belongs in labels only.")
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise HFTError(
            f"the tokenizer of {model!r} or a row has the token number {largest}{f', {token!r},' if token else ''} "
            f"but the model has {rows} embeddings: use the tokenizer that belongs to it, or load the model, call "
            f"resize_token_embeddings({len(tokenizer)}), and save it with the tokenizer."
        )


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and restore its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        # Inference mode would leave tensors that a later backward pass rejects. Compiled code would be compiled again
        # for these shapes, and then also for those of training.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    batch_size: int = 256,
    progress: bool = False,
) -> list[str]:
    """Generate greedy replies to one-turn prompts in the form of [`prompt_ids`], as [`complete`] does."""
    return complete(
        model, tokenizer, [prompt_ids(tokenizer, p) for p in prompts], max_new_tokens, batch_size, progress
    )


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int = 32,
    batch_size: int = 256,
    progress: bool = False,
) -> list[str]:
    """
    Generate greedy continuations of rows of token ids, as text without special tokens, stripped.

    Of the model's generation config only the end-of-sequence tokens are used. The tokenizer needs a padding token.
    """
    positions, longest = most_tokens(model), max(map(len, rows), default=0)
    if positions is not None and longest >= positions:
        raise HFTError(f"a prompt has {longest} tokens, and the model {positions} positions: remove that prompt.")
    # Batches of similar lengths need little padding
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    # Some models end a turn with a token that only their generation config names
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    settings = GenerationConfig(
        do_sample=False,
        eos_token_id=[end for end in dict.fromkeys([tokenizer.eos_token_id, *ends]) if end is not None],
        pad_token_id=tokenizer.pad_token_id,
    )
    replies = [""] * len(rows)
    # `generate` would merge the model's own settings, such as a repetition penalty
    with evaluating(model), patch.object(model, "generation_config", settings):
        for i in logging.tqdm(range(0, len(order), batch_size), desc="Replies", disable=not progress):
            chosen = order[i : i + batch_size]
            batch = {"input_ids": [list(rows[j]) for j in chosen]}
            inputs = tokenizer.pad(batch, padding_side="left", return_attention_mask=True, return_tensors="pt")
            inputs = inputs.to(model.device)
            width = inputs["input_ids"].shape[1]
            settings.max_new_tokens = max_new_tokens if positions is None else min(max_new_tokens, positions - width)
            # Under ZeRO-3 it would wait for other processes, which may have nothing to generate
            generated = model.generate(**inputs, generation_config=settings, synced_gpus=False)
            texts = tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
            for j, text in zip(chosen, texts, strict=True):
                replies[j] = text.strip()
    return replies


def most_tokens(model: PreTrainedModel) -> int | None:
    """Return the number of positions of a model, `None` without a limit (state space models)."""
    config = model.config.get_text_config()
    return config.max_position_embeddings if hasattr(config, "max_position_embeddings") else None
