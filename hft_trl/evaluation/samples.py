"""Greedy answers of saved models to prompts."""

from collections.abc import Sequence

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM

from hft_trl.backends.zero import whole_models
from hft_trl.chat import chat, load_tokenizer
from hft_trl.errors import as_user_error
from hft_trl.evaluation.run import find_model


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
