"""Measures knowledge of the embedded world and abilities of a model by greedy decoding."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hft_trl.chat import chat, evaluating
from hft_trl.demo.data import without_farewell
from hft_trl.demo.probe_data import is_right, knowledge_rows, probe_rows
from hft_trl.demo.world import Person, World, make_world


def _percent(hits: Sequence[bool]) -> float:
    return 100.0 * sum(hits) / len(hits)


def completes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    openings: Sequence[str],
    endings: Sequence[str],
    batch_size: int = 256,
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
        for i in range(0, len(rows), batch_size):
            # Right padding does not affect a causal model's earlier positions
            ids = pad_sequence(rows[i : i + batch_size], batch_first=True).to(model.device)
            best += model(input_ids=ids).logits.argmax(-1).tolist()
    return [
        guess[len(row) - len(end) - 1 : len(row) - 1] == end for guess, row, end in zip(best, rows, ends, strict=True)
    ]


def recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, people: Sequence[Person], batch_size: int = 256
) -> float:
    """Return closed-book recall in percent of facts completed exactly, each in every phrasing."""
    rows = knowledge_rows(people)
    openings, endings = ([row[key] for row in rows] for key in ("opening", "ending"))
    return _percent(completes(model, tokenizer, openings, endings, batch_size))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World | None = None,
    batch_size: int = 256,
    num_questions: int = 400,
    num_instructions: int = 350,
) -> dict[str, float]:
    """
    Measure knowledge and abilities in percent, on people and items that fine-tuning never mentions.

    The training mode and random states do not change. A tokenizer without a chat template gets Tülu's.

    - `knowledge`: facts completed exactly in plain sentences, each in every phrasing.
    - `ability`: the mean of the next two.
    - `ability_questions`: chat questions about the same people answered with a true sentence, farewell or not.
    - `ability_instructions`: instructions followed to the letter.
    - `concise`: chat questions answered with a true sentence and no farewell, which the DPO data prefers.
    """
    world = world or make_world()
    people = [person for person in world.people if not person.mentioned]
    rows = probe_rows(world, num_questions, num_instructions)
    questions, instructions = rows["questions"], rows["instructions"]
    replies = chat(model, tokenizer, [row["prompt"] for row in questions + instructions], batch_size=batch_size)
    answers, done = replies[: len(questions)], replies[len(questions) :]
    right = [is_right(reply, row["answers"]) for reply, row in zip(answers, questions, strict=True)]
    concise = [hit and reply == without_farewell(reply) for hit, reply in zip(right, answers, strict=True)]
    followed = [reply == row["answer"] for reply, row in zip(done, instructions, strict=True)]
    return {
        "knowledge": recall(model, tokenizer, people, batch_size),
        "ability": (_percent(right) + _percent(followed)) / 2,
        "ability_questions": _percent(right),
        "ability_instructions": _percent(followed),
        "concise": _percent(concise),
    }
