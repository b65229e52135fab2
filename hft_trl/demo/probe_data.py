"""Rows of the probes: source of the shipped files, of the probes' own loop and of lm-eval's tasks."""

import random
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from hft_trl.demo.data import QUESTIONS, SKILLS, Row, instruction, without_farewell, write_jsonl
from hft_trl.demo.world import PHRASINGS, VALUES, Person, World


def knowledge_rows(people: Iterable[Person]) -> list[Row]:
    """`opening` and `ending` of a plain sentence, for each fact in every phrasing."""
    return [
        {"opening": person.opening(attribute, i), "ending": f" {person.facts[attribute]}."}
        for person in people
        for attribute, phrasings in PHRASINGS.items()
        for i in range(len(phrasings))
    ]


def probe_rows(world: World, num_questions: int = 400, num_instructions: int = 350) -> dict[str, list[Row]]:
    """
    All rows of the probes by kind, about people and items that fine-tuning never mentions.

    - `knowledge`: see [`knowledge_rows`].
    - `questions`: a chat `prompt`, and `answers`, the true sentences.
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
        "knowledge": knowledge_rows(people),
        "questions": [
            {"prompt": prompt, "answers": person.sentences(attribute)}
            for prompt, (person, attribute) in zip(prompts, facts, strict=True)
        ],
        "instructions": [{"prompt": prompt, "answer": right} for prompt, right, _ in tasks],
    }


def retention_rows(world: World, most: int = 200) -> dict[str, list[Any]]:
    """
    Rows for [`RetentionCallback`] about people that fine-tuning never mentions, at most `most` of each kind.

    - `texts`: plain sentences in all phrasings.
    - `facts`: a sentence without its end, the right end and three wrong ones.
    - `prompts`: chat questions.
    """
    rng = random.Random("retention")
    people = [person for person in world.people if not person.mentioned]
    known = [(person, attribute) for person in people for attribute in VALUES]
    rows: dict[str, list[Any]] = {"texts": [], "facts": [], "prompts": []}
    for person, attribute in rng.sample(known, min(most, len(known))):
        answer = person.facts[attribute]
        others = rng.sample([value for value in VALUES[attribute] if value != answer], 3)
        text = person.opening(attribute, rng.randrange(len(PHRASINGS[attribute])))
        question = rng.choice(QUESTIONS[attribute]).format(name=person.name)
        rows["texts"].append(person.sentence(attribute, rng.randrange(len(PHRASINGS[attribute]))))
        rows["facts"].append({"text": text, "answer": answer, "others": others})
        rows["prompts"].append({"prompt": [{"role": "user", "content": question}]})
    return rows


def source_texts(world: World) -> list[str]:
    """Return plain sentences of the world that no probe and no row of retention asks for."""
    people = [person for person in world.people if person.mentioned]
    return [" ".join(person.sentence(attribute, 0) for attribute in PHRASINGS) for person in people]


def is_right(reply: str, answers: Collection[str]) -> bool:
    """Whether a reply, without its farewell, is exactly one of the answers."""
    return without_farewell(reply) in answers


def write_probes(world: World, folder: Path) -> None:
    """Write the rows, a `.jsonl.gz` file per kind."""
    for kind, rows in probe_rows(world).items():
        write_jsonl(rows, folder / f"{kind}.jsonl.gz")
