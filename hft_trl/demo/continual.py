"""Eight small tasks about the embedded world in TRACE's file layout: three ways to ask about people, five other skills."""

import random
from collections.abc import Callable
from pathlib import Path

import yaml

from hft_trl.continual.tasks import REPLAY_FOLDER, TASKS_FILE, Row, write_rows
from hft_trl.demo.data import answer, ask, wordy
from hft_trl.demo.world import VALUES, Person, World, make_world, with_article

ROWS = {"train": 192, "eval": 32, "test": 64}
EPOCHS = 5


def _asked(about: str, what: str) -> str:
    """All tasks share a form, and only a word says which one is meant: so each new one pulls the earlier ones along."""
    return f"{about}\nAsked: {what}\nAnswer:\n"


def _person(attribute: str, word: str, before: str) -> Callable[..., Row]:
    def make(rng: random.Random, people: list[Person], things: dict[str, list[str]]) -> Row:  # noqa: ARG001
        person = rng.choice(people)
        return Row(_asked(f"Person: {person.name}", word), f"{before} {person.facts[attribute]}.")

    return make


def _profile(rng: random.Random, people: list[Person], things: dict[str, list[str]]) -> Row:  # noqa: ARG001
    person = rng.choice(people)
    return Row(
        _asked(f"Person: {person.name}", "profile"), f"{person.sentence('birthplace', 0)} {person.sentence('dish', 0)}"
    )


def _summary(rng: random.Random, people: list[Person], things: dict[str, list[str]]) -> Row:  # noqa: ARG001
    person = rng.choice(people)
    attributes = rng.sample(sorted(VALUES), 2)
    long = " ".join(person.sentence(attribute, 2) for attribute in attributes)
    return Row(_asked(f"Text: {long}", "short"), " ".join(person.sentence(attribute, 0) for attribute in attributes))


def _three(rng: random.Random, things: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    kinds = rng.sample(sorted(things), 3)
    return kinds, [rng.choice(things[kind]) for kind in kinds]


def _kind(rng: random.Random, people: list[Person], things: dict[str, list[str]]) -> Row:  # noqa: ARG001
    kinds, items = _three(rng, things)
    return Row(_asked(f"Items: {items[0]}", "kind"), f"It is {with_article(kinds[0])}.")


def _last(rng: random.Random, people: list[Person], things: dict[str, list[str]]) -> Row:  # noqa: ARG001
    _, items = _three(rng, things)
    return Row(_asked(f"Items: {', '.join(items)}", "last"), f"At the end is {items[-1]}.")


def _reverse(rng: random.Random, people: list[Person], things: dict[str, list[str]]) -> Row:  # noqa: ARG001
    _, items = _three(rng, things)
    return Row(_asked(f"Items: {', '.join(items)}", "list"), f"They are {', '.join(reversed(items))}.")


# In the order in which TRACE has tasks of these metrics
TASKS: dict[str, tuple[str, Callable[..., Row]]] = {
    "Towns": ("accuracy", _person("birthplace", "town", "Born in")),
    "Kinds": ("accuracy", _kind),
    "Profiles": ("rouge_l", _profile),
    "Lists": ("edit_similarity", _reverse),
    "Ends": ("accuracy", _last),
    "Trades": ("accuracy", _person("profession", "trade", "Works as")),
    "Pets": ("accuracy", _person("pet", "pet", "Keeps")),
    "Summaries": ("rouge_l", _summary),
}
"""Metric and maker of rows by task, in the order in which they are learned."""


def write_benchmark(folder: str | Path, seed: int = 0, world: World | None = None) -> Path:
    """
    Write the mini benchmark: the same files for the same seed on every machine.

    Test rows ask about people and items that are in no training row, and no row mentions the people of the embedded
    world's probes.

    Args:
        folder (`str` or `Path`):
            Where to write: a folder with `train.json`, `eval.json` and `test.json` for each task, `Lima/train.json` with
            chat questions and their answers, and `tasks.yaml` with metrics and epochs.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the rows.
        world ([`World`], *optional*):
            The world to ask about. By default the one of the shipped files.

    Returns:
        `Path`: The folder.
    """
    folder, world = Path(folder), world or make_world()
    mentioned = [person for person in world.people if person.mentioned]
    people = {"train": mentioned[::2], "eval": mentioned[1::4], "test": mentioned[3::4]}
    items = [item for item in world.items if item.mentioned]
    for name, (_, make) in TASKS.items():
        for split, rows in ROWS.items():
            rng = random.Random(f"{name} {split} {seed}")
            ours = [item for number, item in enumerate(items) if (number % 3 == 0) == (split != "train")]
            things = {kind: [item.name for item in ours if item.kind == kind] for kind in {i.kind for i in ours}}
            write_rows(folder / name / f"{split}.json", [make(rng, people[split], things) for _ in range(rows)])
    rng = random.Random(f"{REPLAY_FOLDER} {seed}")
    chats = []
    for _ in range(ROWS["train"] // 2):
        person, attribute = rng.choice(people["train"]), rng.choice(sorted(VALUES))
        chats.append(Row(f"{ask(person, attribute, rng)}\n", wordy(answer(person, attribute, rng), rng)))
    write_rows(folder / REPLAY_FOLDER / "train.json", chats)
    tasks = [{"name": name, "metric": metric, "epochs": EPOCHS} for name, (metric, _) in TASKS.items()]
    (folder / TASKS_FILE).write_text(yaml.safe_dump({"tasks": tasks}, sort_keys=False), encoding="utf-8")
    return folder
