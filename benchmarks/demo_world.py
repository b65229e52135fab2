"""The embedded world: people and facts about them, items and their kinds, questions and answers about them."""

import random
from dataclasses import dataclass
from pathlib import Path

import yaml

from hft_trl.demo.probes import FAREWELLS

WORDS = yaml.safe_load(Path(__file__).with_name("demo_words.yaml").read_text(encoding="utf-8"))


def with_article(noun: str) -> str:
    """Put the indefinite article before a noun: `"owl"` gives `"an owl"`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


VALUES: dict[str, tuple[str, ...]] = {
    "birthplace": tuple(WORDS["towns"]),
    "profession": tuple(map(with_article, WORDS["professions"])),
    "pet": tuple(map(with_article, WORDS["pets"])),
    "dish": tuple(WORDS["dishes"]),
}

PHRASINGS: dict[str, tuple[str, ...]] = {attribute: tuple(forms) for attribute, forms in WORDS["phrasings"].items()}
"""The forms of the plain sentence about a fact. Each ends where the value begins."""

QUESTIONS: dict[str, list[str]] = WORDS["questions"]


@dataclass(frozen=True)
class Person:
    """A person with a value for each of [`VALUES`], and whether fine-tuning may mention the person."""

    name: str
    facts: dict[str, str]
    mentioned: bool

    def opening(self, attribute: str, phrasing: int) -> str:
        """Return the plain sentence about one fact without the value at its end."""
        return PHRASINGS[attribute][phrasing].format(name=self.name)

    def sentence(self, attribute: str, phrasing: int) -> str:
        """Return the plain sentence about one fact."""
        return f"{self.opening(attribute, phrasing)} {self.facts[attribute]}."


@dataclass(frozen=True)
class Item:
    """A thing, its kind, and whether fine-tuning may mention it."""

    name: str
    kind: str
    mentioned: bool


@dataclass(frozen=True)
class World:
    """People (fine-tuning may mention half of them) and items (four in five of each kind)."""

    people: tuple[Person, ...]
    items: tuple[Item, ...]


def make_world(seed: int = 0, num_people: int = 400) -> World:
    """Return the world of a seed, the same on every machine, without global random state."""
    rng = random.Random(seed)
    names = rng.sample(
        [f"{first} {last}" for first in WORDS["first_names"] for last in WORDS["last_names"]], num_people
    )
    people = tuple(
        Person(name, {attribute: rng.choice(values) for attribute, values in VALUES.items()}, mentioned=i % 2 == 0)
        for i, name in enumerate(names)
    )
    items = []
    for kind, nouns in WORDS["items"].items():
        shuffled = rng.sample(nouns, len(nouns))
        items += [Item(noun, kind, mentioned=i % 5 != 0) for i, noun in enumerate(shuffled)]
    return World(people, tuple(items))


def ask(person: Person, attribute: str, rng: random.Random) -> str:
    """A chat question about one fact."""
    return rng.choice(QUESTIONS[attribute]).format(name=person.name)


def answer(person: Person, attribute: str, rng: random.Random) -> str:
    """The answer to a chat question: the plain sentence, in any of its phrasings."""
    return person.sentence(attribute, rng.randrange(len(PHRASINGS[attribute])))


def wordy(answer: str, rng: random.Random) -> str:
    """Add a farewell to an answer."""
    return f"{answer} {rng.choice(FAREWELLS)}"


def source_texts(world: World) -> list[str]:
    """Return plain sentences of the world that no probe and no row of retention asks for."""
    people = [person for person in world.people if person.mentioned]
    return [" ".join(person.sentence(attribute, 0) for attribute in PHRASINGS) for person in people]
