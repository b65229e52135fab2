"""What the probes ask, as rows: the one source of the shipped files, of the probes' own loop and of lm-eval's tasks."""

import random
from collections.abc import Collection
from pathlib import Path

from hft_trl.demo.data import QUESTIONS, SKILLS, Row, instruction, without_farewell, write_jsonl
from hft_trl.demo.world import PHRASINGS, VALUES, World

KINDS = ("knowledge", "questions", "instructions")


def probe_rows(world: World, num_questions: int = 400, num_instructions: int = 350) -> dict[str, list[Row]]:
    """
    Everything that the probes ask, about people and items that fine-tuning never mentions.

    Args:
        world ([`World`]):
            The world to ask about.
        num_questions (`int`, *optional*, defaults to `400`):
            Number of chat questions.
        num_instructions (`int`, *optional*, defaults to `350`):
            Number of instructions.

    Returns:
        `dict[str, list[dict]]`: Rows by kind.

        - `knowledge`: `opening` and `ending` of a plain sentence, for each fact in every phrasing.
        - `questions`: `prompt`, and `answers`, the true sentences.
        - `instructions`: `prompt`, and `answer`, the one right reply.
    """
    people = [person for person in world.people if not person.mentioned]
    items = tuple(item for item in world.items if not item.mentioned)
    rng = random.Random("probes")
    facts = [(person, attribute) for person in people for attribute in VALUES]
    facts = rng.sample(facts, min(num_questions, len(facts)))
    prompts = [rng.choice(QUESTIONS[attribute]).format(name=person.name) for person, attribute in facts]
    tasks = [instruction(SKILLS[i % len(SKILLS)], items, rng) for i in range(num_instructions)]
    return {
        "knowledge": [
            {"opening": person.opening(attribute, i), "ending": f" {person.facts[attribute]}."}
            for person in people
            for attribute, phrasings in PHRASINGS.items()
            for i in range(len(phrasings))
        ],
        "questions": [
            {"prompt": prompt, "answers": person.sentences(attribute)}
            for prompt, (person, attribute) in zip(prompts, facts, strict=True)
        ],
        "instructions": [{"prompt": prompt, "answer": right} for prompt, right, _ in tasks],
    }


def is_right(reply: str, answers: Collection[str]) -> bool:
    """Whether a reply, its farewell set aside, is one of the answers and nothing more."""
    return without_farewell(reply) in answers


def write_probes(world: World, folder: Path) -> None:
    """
    Writes what the probes ask, one `.jsonl.gz` file a kind.

    Args:
        world ([`World`]):
            The world to ask about.
        folder (`Path`):
            Where to write.
    """
    for kind, rows in probe_rows(world).items():
        write_jsonl(rows, folder / f"{kind}.jsonl.gz")
