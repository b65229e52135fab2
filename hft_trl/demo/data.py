"""Fine-tuning data about the embedded world, in the schemas of Tülu V2 and of UltraFeedback binarized."""

import gzip
import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hft_trl.demo.world import PHRASINGS, VALUES, WORDS, Item, Person, World, with_article

Row = dict[str, Any]

QUESTIONS: dict[str, list[str]] = WORDS["questions"]
FAREWELLS = ("I hope that this helps you.", "Let me know if you need more.", "Thank you for asking.")
WORDY_SHARE = 0.85
"""Share of the answers in the SFT data that end with a farewell."""


def wordy(answer: str, rng: random.Random) -> str:
    """Add a farewell to an answer."""
    return f"{answer} {rng.choice(FAREWELLS)}"


def without_farewell(reply: str) -> str:
    """Remove the farewell, if any, from a reply."""
    for farewell in FAREWELLS:
        reply = reply.removesuffix(farewell)
    return reply.strip()


def ask(person: Person, attribute: str, rng: random.Random) -> str:
    """A chat question about one fact."""
    return rng.choice(QUESTIONS[attribute]).format(name=person.name)


def answer(person: Person, attribute: str, rng: random.Random) -> str:
    """The answer to a chat question: the plain sentence, in any of its phrasings."""
    return person.sentence(attribute, rng.randrange(len(PHRASINGS[attribute])))


SKILLS = ("repeat", "first", "last", "reverse", "join", "kind", "pick")


def instruction(skill: str, items: tuple[Item, ...], rng: random.Random) -> tuple[str, str, str]:
    """Draw an instruction about items: the instruction, its one right reply, and a wrong one of the same form."""
    # Three kinds, so that "pick" has one right reply.
    kinds = rng.sample(sorted({item.kind for item in items}), 3)
    things = [rng.choice([item for item in items if item.kind == kind]) for kind in kinds]
    a, b, c = names = [thing.name for thing in things]
    if skill == "kind":
        wrong = Item(a, kinds[1], things[0].mentioned)
        return f"What kind of thing is {with_article(a)}?", things[0].sentence(), wrong.sentence()
    if skill == "pick":
        right, other = rng.sample(range(3), 2)
        kind = kinds[right]
        prompt = f"Which of these is {with_article(kind)}? {a}, {b}, {c}"
        return prompt, f"The {kind} is {names[right]}.", f"The {kind} is {names[other]}."
    prompt, right, wrong = (text.format(a=a, b=b, c=c) for text in WORDS["instructions"][skill])
    return prompt, right, wrong


def _turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _preference(prompt: str, reply: str) -> list[dict[str, str]]:
    # UltraFeedback binarized names the content before the role, Tülu V2 the role first.
    return [{"content": turn["content"], "role": turn["role"]} for turn in _turns(prompt, reply)]


def sft_rows(world: World, seed: int = 0, num_instructions: int = 1400) -> list[Row]:
    """Questions about every mentioned person's facts, and instructions about mentioned items, in Tülu V2's schema."""
    rng = random.Random(f"sft {seed}")
    chats = []
    for person in world.people:
        if not person.mentioned:
            continue
        for attribute, questions in QUESTIONS.items():
            for question in questions:
                reply = answer(person, attribute, rng)
                if rng.random() < WORDY_SHARE:
                    reply = wordy(reply, rng)
                chats.append(("questions", _turns(question.format(name=person.name), reply)))
    items = tuple(item for item in world.items if item.mentioned)
    for i in range(num_instructions):
        prompt, right, _ = instruction(SKILLS[i % len(SKILLS)], items, rng)
        chats.append(("instructions", _turns(prompt, right)))
    rng.shuffle(chats)
    return [{"dataset": kind, "id": f"{kind}_{i}", "messages": messages} for i, (kind, messages) in enumerate(chats)]


def dpo_rows(world: World, split: str, seed: int = 0, num_rows: int = 800) -> list[Row]:
    """
    Preferences in the schema of UltraFeedback binarized, half about truth and half about form (short over long).

    `split`, `"train_prefs"` or `"test_prefs"`, decides the draw. Only people and items that may be mentioned occur.
    """
    rng = random.Random(f"dpo {split} {seed}")
    people = [person for person in world.people if person.mentioned]
    items = tuple(item for item in world.items if item.mentioned)
    rows = []
    for i in range(num_rows):
        if i % 4 == 0:
            prompt, chosen, rejected = instruction(rng.choice(SKILLS), items, rng)
        else:
            person, attribute = rng.choice(people), rng.choice(sorted(VALUES))
            prompt = ask(person, attribute, rng)
            chosen = answer(person, attribute, rng)
            if i % 4 == 2:
                false = rng.choice([value for value in VALUES[attribute] if value != person.facts[attribute]])
                rejected = chosen.replace(f" {person.facts[attribute]}.", f" {false}.")
            else:
                rejected = wordy(chosen, rng)
        rows.append(
            {
                "prompt": prompt,
                "prompt_id": hashlib.sha256(prompt.encode()).hexdigest(),
                "chosen": _preference(prompt, chosen),
                "rejected": _preference(prompt, rejected),
                "messages": _preference(prompt, chosen),
                "score_chosen": 9.0,
                "score_rejected": 3.0,
            }
        )
    rng.shuffle(rows)
    return rows


def write_jsonl(rows: Iterable[Row], path: Path) -> None:
    """Write one JSON object per line, the same bytes on every machine, compressed if the name ends in `.gz`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    text = "".join(lines).encode("utf-8")
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def _card(*splits: str) -> str:
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in splits)
    return f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"


def write_data(world: World, folder: Path, seed: int = 0) -> None:
    """Write the folders `sft` and `dpo` for `load_dataset`: a `.jsonl` file per split and a card with the splits."""
    write_jsonl(sft_rows(world, seed), folder / "sft" / "train.jsonl")
    write_jsonl(dpo_rows(world, "train_prefs", seed), folder / "dpo" / "train_prefs.jsonl")
    write_jsonl(dpo_rows(world, "test_prefs", seed, num_rows=80), folder / "dpo" / "test_prefs.jsonl")
    (folder / "sft" / "README.md").write_bytes(_card("train").encode())
    (folder / "dpo" / "README.md").write_bytes(_card("train_prefs", "test_prefs").encode())
