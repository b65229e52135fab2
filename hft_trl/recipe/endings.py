"""Adjust generation configs so that tuned models stop at the ends of their turns and can be saved."""

from collections import Counter
from itertools import groupby

from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hft_trl.errors import as_user_error, first_line, speaks

logger = logging.get_logger(__name__)

SAMPLE = 1000  # rows to inspect
OFTEN = 0.05  # share of the trained spans; fewer may end with a token by chance, when they are truncated


def settle_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> None:
    """Let a model stop at the tokens that end the turns of a trainer's rows, in every save from now on."""
    settle_sampling(model.generation_config)
    stops = model.generation_config.eos_token_id
    stops = list(stops) if isinstance(stops, list) else [] if stops is None else [stops]
    new = [end for end in trained_ends(dataset, tokenizer) if end not in (*stops, tokenizer.eos_token_id)]
    if new:
        model.generation_config.eos_token_id = stops + new
        if speaks():
            logger.warning(
                f"turns end with {', '.join(tokenizer.convert_ids_to_tokens(new))}, not with eos_token "
                f"{tokenizer.eos_token}: added to eos_token_id in generation_config.json, so that the tuned model "
                "stops there."
            )


def settle_sampling(config: GenerationConfig) -> None:
    """Enable sampling in a config that could not be saved without it."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        config.do_sample = True
        with as_user_error("generation_config.json"):
            config.validate(strict=True)
        if speaks():
            logger.warning(f"do_sample is set to true in generation_config.json: {first_line(error)}.")


def trained_ends(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Find the special tokens that end the trained spans of a trainer's rows, most frequent first.

    Spans are runs of trained tokens in a sample of rows: of `labels`, or the preferred answers.
    """
    columns = [name for name in ("chosen_ids", "completion_ids", "labels") if name in dataset.column_names]
    if not columns:  # rows of a user's own trainer
        return []
    special = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    ends: Counter[int | None] = Counter()
    for row in dataset.select(range(0, len(dataset), max(len(dataset) // SAMPLE, 1)))[columns[0]]:
        for is_trained, span in groupby(row, key=lambda token: token != -100):
            if not is_trained:
                continue
            end = None
            for token in reversed(list(span)):  # a newline or an end-of-text token may follow the one of the turn
                if token in special:
                    end = token
                elif tokenizer.decode([token]).strip():
                    break
            ends[end] += 1
    return [end for end, count in ends.most_common() if end is not None and count >= OFTEN * ends.total()]
