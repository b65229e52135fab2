"""Greedy answers of saved models to prompts, as texts or in the file format of AlpacaEval's judge."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM

from hft_trl.backends.zero import whole_models
from hft_trl.chat import chat, load_tokenizer
from hft_trl.errors import HFTError, as_user_error
from hft_trl.evaluation.run import find_model
from hft_trl.files import read_texts, replacing, writing


def sample_answers(
    model: str,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    *,
    chat_template: str | None = None,
    dtype: str = "auto",
    batch_size: int = 16,
    progress: bool = False,
) -> list[str]:
    """
    Return a model's greedy answers to one-turn prompts in its chat template (Tülu's if it has none).

    `model` is a folder, a hub id, `"demo"` or `"smollm2"`. Each process that calls this loads a whole model. An
    unknown model or a prompt that is too long for it raises an [`HFTError`].
    """
    folder = find_model(model)
    tokenizer = load_tokenizer(str(folder), chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    with as_user_error(f"the model {model!r}"), whole_models():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    return chat(loaded, tokenizer, prompts, max_new_tokens, batch_size, progress)


def write_replies(
    name: str,
    prompts: Path,
    output: Path,
    generator: str,
    *,
    limit: int | None = None,
    chat_template: str | None = None,
    dtype: str = "auto",
    batch_size: int = 16,
    max_new_tokens: int = 2048,
) -> int:
    """
    Write a model's greedy replies to a file of prompts, and return their number.

    `prompts` has the format of `tatsu-lab/alpaca_eval` and of outputs files: `instruction`, and perhaps `dataset`. The
    file adds `output` and `generator`, the name that the judge shows.
    """
    rows = read_texts(prompts, "instruction")[:limit]
    if output.is_dir():
        raise HFTError(f"{output} is a folder: give a file with --output.")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as new:
            new.touch()  # fails before the replies are generated
            replies = sample_answers(
                name,
                [row["instruction"] for row in rows],
                max_new_tokens,
                chat_template=chat_template,
                dtype=dtype,
                batch_size=batch_size,
                progress=True,
            )
            answered = [
                {"dataset": "", **row, "output": reply, "generator": generator}
                for row, reply in zip(rows, replies, strict=True)
            ]
            new.write_text(json.dumps(answered, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(answered)
