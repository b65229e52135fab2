"""What a model knows of the small world and what it can do: two probes, both without any randomness in the model."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hft_trl.chat import chat, evaluating
from hft_trl.demo.data import without_farewell
from hft_trl.demo.probe_data import is_right, probe_rows
from hft_trl.demo.world import PHRASINGS, Person, World, make_world


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
    Whether greedy decoding ends each opening with exactly the tokens of its ending.

    Greedy decoding writes the ending if and only if each of its tokens is the most likely one after the opening and
    the ending's earlier tokens, so one forward pass tells, and nothing need be generated.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, on any device. Its training mode is left as it was.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        openings (`Sequence[str]`):
            The texts to go on from.
        endings (`Sequence[str]`):
            The wanted end of each text.
        batch_size (`int`, *optional*, defaults to `256`):
            Texts in a forward pass.

    Returns:
        `list[bool]`: One answer for each opening.
    """
    starts = tokenizer(list(openings))["input_ids"]
    ends = tokenizer(list(endings), add_special_tokens=False)["input_ids"]
    hits = []
    with evaluating(model):
        for i in range(0, len(starts), batch_size):
            rows = [
                start + end for start, end in zip(starts[i : i + batch_size], ends[i : i + batch_size], strict=True)
            ]
            width = max(map(len, rows))
            # Padding on the right of a causal model changes nothing to its left; any id will do.
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
            best = model(input_ids=ids).logits.argmax(-1).tolist()
            for row, guess, end in zip(rows, best, ends[i : i + batch_size], strict=True):
                hits.append(guess[len(row) - len(end) - 1 : len(row) - 1] == end)
    return hits


def recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, people: Sequence[Person], batch_size: int = 256
) -> float:
    """
    Closed-book recall: the share of facts that the model completes exactly, each asked in every plain phrasing.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, on any device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        people (`Sequence[Person]`):
            Whose facts to ask.
        batch_size (`int`, *optional*, defaults to `256`):
            Sentences in a forward pass.

    Returns:
        `float`: Per cent.
    """
    asked = [(person, a, i) for person in people for a, phrasings in PHRASINGS.items() for i in range(len(phrasings))]
    openings = [person.opening(attribute, i) for person, attribute, i in asked]
    endings = [f" {person.facts[attribute]}." for person, attribute, _ in asked]
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
    Measures what a model knows and what it can do, on people and items that fine-tuning never mentions.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, on any device. Its training mode and every random state are left as they were.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. Where it has no chat template, Tülu's is used.
        world ([`World`], *optional*):
            The world. By default the one of the shipped files.
        batch_size (`int`, *optional*, defaults to `256`):
            Texts in a batch.
        num_questions (`int`, *optional*, defaults to `400`):
            Number of chat questions.
        num_instructions (`int`, *optional*, defaults to `350`):
            Number of instructions.

    Returns:
        `dict[str, float]`: Per cent, from 0 to 100.

        - `knowledge`: facts completed exactly in plain language form, each in every phrasing.
        - `ability`: the mean of the next two.
        - `ability_questions`: chat questions about the same people answered with a true sentence, with or without a
          farewell after it.
        - `ability_instructions`: instructions followed to the letter.
        - `concise`: chat questions answered with a true sentence and no farewell, the form that DPO's data prefers.
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
