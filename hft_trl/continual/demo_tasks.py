"""Write the embedded mini benchmark: eight small tasks about the demo's world, in TRACE's layout."""

import random
from collections.abc import Callable
from pathlib import Path

import yaml

from hft_trl.continual.tasks import REPLAY_FOLDER, TASKS_FILE, Row, write_rows
from hft_trl.demo.data import answer, ask, wordy
from hft_trl.demo.world import VALUES, Person, make_world, with_article

ROWS = {"train": 192, "eval": 32, "test": 64}
"""Rows of each file. A test file has fewer if there are fewer distinct ones."""
DRAWS = 1000
EPOCHS = 4

Items = dict[str, list[str]]  # names by kind
Maker = Callable[[random.Random, list[Person], Items], Row]


def _fact(attribute: str, question: str, before: str) -> Maker:
    def make(rng: random.Random, people: list[Person], items: Items) -> Row:  # noqa: ARG001
        person = rng.choice(people)
        return Row(f"{question.format(name=person.name)}\n", f"{before} {person.facts[attribute]}.")

    return make


def _profile(rng: random.Random, people: list[Person], items: Items) -> Row:  # noqa: ARG001
    person = rng.choice(people)
    sentences = " ".join(person.sentence(attribute, 1) for attribute in ("dish", "birthplace"))
    return Row(f"Write about {person.name}.\n", sentences)


def _summary(rng: random.Random, people: list[Person], items: Items) -> Row:  # noqa: ARG001
    person = rng.choice(people)
    attributes = rng.sample(sorted(VALUES), 2)
    long, short = (" ".join(person.sentence(attribute, form) for attribute in attributes) for form in (2, 0))
    return Row(f"Say in short: {long}\n", short)


def _three(rng: random.Random, items: Items) -> list[str]:
    return [rng.choice(items[kind]) for kind in rng.sample(sorted(items), 3)]


def _kind(rng: random.Random, people: list[Person], items: Items) -> Row:  # noqa: ARG001
    kind = rng.choice(sorted(items))
    item = rng.choice(items[kind])
    return Row(f"What kind of thing is {with_article(item)}?\n", f"It is {with_article(kind)}.")


def _list(rng: random.Random, people: list[Person], items: Items) -> Row:  # noqa: ARG001
    names = _three(rng, items)
    return Row(f"Turn the list around: {', '.join(names)}\n", f"{', '.join(reversed(names))}.")


def _last(rng: random.Random, people: list[Person], items: Items) -> Row:  # noqa: ARG001
    names = _three(rng, items)
    return Row(f"Which word comes last? {', '.join(names)}\n", f"At the end is {names[-1]}.")


# The metrics are in the same order as those of TRACE's tasks
TASKS: dict[str, tuple[str, Maker]] = {
    "Towns": ("accuracy", _fact("birthplace", "Where was {name} born?", "Born in")),
    "Kinds": ("accuracy", _kind),
    "Profiles": ("rouge_l", _profile),
    "Lists": ("edit_similarity", _list),
    "Ends": ("accuracy", _last),
    "Trades": ("accuracy", _fact("profession", "What does {name} do for a living?", "Works as")),
    "Pets": ("accuracy", _fact("pet", "Which pet does {name} have?", "Keeps")),
    "Summaries": ("rouge_l", _summary),
}
"""Metric and maker of rows by task, in the order in which they are learned."""


def write_benchmark(folder: str | Path, seed: int = 0) -> Path:
    """Write the mini benchmark to a folder: the same files for the same seed on every machine."""
    # Test rows ask about people and items that are in no training row, and no row mentions the probes' people
    folder, world = Path(folder), make_world()
    mentioned = [person for person in world.people if person.mentioned]
    people = {"train": mentioned[::2], "eval": mentioned[1::4], "test": mentioned[3::4]}
    items = [item for item in world.items if item.mentioned]
    for name, (_, make) in TASKS.items():
        for split, count in ROWS.items():
            rng = random.Random(f"{name} {split} {seed}")
            ours = [item for number, item in enumerate(items) if (number % 3 == 0) == (split != "train")]
            things = {kind: [item.name for item in ours if item.kind == kind] for kind in {i.kind for i in ours}}
            rows = [make(rng, people[split], things) for _ in range(DRAWS if split == "test" else count)]
            if split == "test":
                rows = list(dict.fromkeys(rows))[:count]
            write_rows(folder / name / f"{split}.json", rows)
    rng = random.Random(f"{REPLAY_FOLDER} {seed}")
    chats = []
    for _ in range(ROWS["train"] // 2):
        person, attribute = rng.choice(people["train"]), rng.choice(sorted(VALUES))
        chats.append(Row(f"{ask(person, attribute, rng)}\n", wordy(answer(person, attribute, rng), rng)))
    write_rows(folder / REPLAY_FOLDER / "train.json", chats)
    tasks = [{"name": name, "metric": metric, "epochs": EPOCHS} for name, (metric, _) in TASKS.items()]
    (folder / TASKS_FILE).write_text(yaml.safe_dump({"tasks": tasks}, sort_keys=False), encoding="utf-8")
    return folder
