"""Probes of the embedded world: what a model knows and can do, measured by greedy decoding."""

import gzip
import json
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hft_trl import demo
from hft_trl.chat import chat, evaluating

BATCH = 256  # rows of a forward pass
FAREWELLS = ("I hope that this helps you.", "Let me know if you need more.", "Thank you for asking.")


def probe_rows(kind: str) -> list[dict[str, Any]]:
    """
    Read the rows of a probe, about people and items that fine-tuning never mentions.

    - `"knowledge"`: `opening` and `ending` of a plain sentence, for each fact in every phrasing.
    - `"questions"`: a chat `prompt`, and `answers`, the true sentences.
    - `"instructions"`: `prompt`, and `answer`, the one right reply.
    - `"retention"`: a `text`, a `fact` and a `prompt` for [`RetentionCallback`].
    - `"source"`: a `text` that no other probe asks for.
    """
    text = gzip.decompress((demo.PROBES / f"{kind}.jsonl.gz").read_bytes()).decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def without_farewell(reply: str) -> str:
    """Remove the farewell, if any, from a reply."""
    for farewell in FAREWELLS:
        reply = reply.removesuffix(farewell)
    return reply.strip()


def is_right(reply: str, answers: Collection[str]) -> bool:
    """Whether a reply, without its farewell, is exactly one of the answers."""
    return without_farewell(reply) in answers


def completes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, openings: Sequence[str], endings: Sequence[str]
) -> list[bool]:
    """
    Whether greedy decoding continues each opening with exactly the tokens of its ending.

    One forward pass is enough: each of these tokens has to be the most likely one after those before it.
    """
    starts = tokenizer(list(openings))["input_ids"]
    ends = tokenizer(list(endings), add_special_tokens=False)["input_ids"]
    rows = [torch.tensor(start + end) for start, end in zip(starts, ends, strict=True)]
    best: list[list[int]] = []
    with evaluating(model):
        for i in range(0, len(rows), BATCH):
            # Right padding does not affect a causal model's earlier positions
            ids = pad_sequence(rows[i : i + BATCH], batch_first=True).to(model.device)
            best += model(input_ids=ids).logits.argmax(-1).tolist()
    return [
        guess[len(row) - len(end) - 1 : len(row) - 1] == end for guess, row, end in zip(best, rows, ends, strict=True)
    ]


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """
    Measure [`hft_trl.demo.MEANINGS`] and both parts of ability in percent.

    The training mode and random states do not change. A tokenizer without a chat template gets Tülu's.
    """
    facts, questions, instructions = (probe_rows(kind) for kind in ("knowledge", "questions", "instructions"))
    replies = chat(model, tokenizer, [row["prompt"] for row in questions + instructions])
    answers, done = replies[: len(questions)], replies[len(questions) :]
    openings, endings = ([row[key] for row in facts] for key in ("opening", "ending"))
    right = [is_right(reply, row["answers"]) for reply, row in zip(answers, questions, strict=True)]
    concise = [hit and reply == without_farewell(reply) for hit, reply in zip(right, answers, strict=True)]
    followed = [reply == row["answer"] for reply, row in zip(done, instructions, strict=True)]
    return {
        "knowledge": _percent(completes(model, tokenizer, openings, endings)),
        "ability": (_percent(right) + _percent(followed)) / 2,
        "ability_questions": _percent(right),
        "ability_instructions": _percent(followed),
        "concise": _percent(concise),
    }


def _percent(hits: Sequence[bool]) -> float:
    return 100.0 * sum(hits) / len(hits)
