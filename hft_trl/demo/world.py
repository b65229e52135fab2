"""The small world: people and facts about them, items and their kinds, in English-like sentences."""

import random
from dataclasses import dataclass

from hft_trl.demo.words import DISHES, FIRST_NAMES, ITEMS, LAST_NAMES, PETS, PROFESSIONS, TOWNS


def with_article(noun: str) -> str:
    """Puts the indefinite article before a noun: `"owl"` gives `"an owl"`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


VALUES: dict[str, tuple[str, ...]] = {
    "birthplace": TOWNS,
    "profession": tuple(with_article(noun) for noun in PROFESSIONS),
    "pet": tuple(with_article(noun) for noun in PETS),
    "dish": DISHES,
}

# Each phrasing ends where the value begins, so that a plain sentence is a question too: let the model end it.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "birthplace": ("{name} was born in", "{name} comes from the town of", "The birthplace of {name} is"),
    "profession": ("{name} works as", "{name} earns a living as", "By trade, {name} is"),
    "pet": ("{name} keeps", "{name} shares the house with", "The pet of {name} is"),
    "dish": ("{name} likes to eat", "{name} never says no to", "The favourite dish of {name} is"),
}


@dataclass(frozen=True)
class Person:
    """
    A person and what the world knows about them.

    Args:
        name (`str`):
            First and last name. The pair is unique in a world, neither half is.
        facts (`dict[str, str]`):
            The value of each attribute of [`VALUES`].
        mentioned (`bool`):
            Whether fine-tuning may mention this person.
    """

    name: str
    facts: dict[str, str]
    mentioned: bool

    def opening(self, attribute: str, phrasing: int) -> str:
        """The plain sentence about one fact up to, and without, the value."""
        return PHRASINGS[attribute][phrasing].format(name=self.name)

    def sentence(self, attribute: str, phrasing: int) -> str:
        """The plain sentence about one fact."""
        return f"{self.opening(attribute, phrasing)} {self.facts[attribute]}."

    def sentences(self, attribute: str) -> list[str]:
        """Every plain sentence about one fact."""
        return [self.sentence(attribute, phrasing) for phrasing in range(len(PHRASINGS[attribute]))]


@dataclass(frozen=True)
class Item:
    """
    A thing and its kind.

    Args:
        name (`str`):
            The noun.
        kind (`str`):
            What kind of thing it is.
        mentioned (`bool`):
            Whether fine-tuning may mention this item.
    """

    name: str
    kind: str
    mentioned: bool

    def sentence(self) -> str:
        """The plain sentence about the kind."""
        return f"{with_article(self.name).capitalize()} is {with_article(self.kind)}."


@dataclass(frozen=True)
class World:
    """
    Everything that there is to know.

    Args:
        people (`tuple[Person, ...]`):
            The people. Half of them may be mentioned in fine-tuning.
        items (`tuple[Item, ...]`):
            The items. Four in five of each kind may be mentioned in fine-tuning.
    """

    people: tuple[Person, ...]
    items: tuple[Item, ...]

    def sentences(self) -> list[str]:
        """Every plain sentence of the world: each fact in each phrasing, and each item's kind."""
        about_people = [
            person.sentence(attribute, phrasing)
            for person in self.people
            for attribute, phrasings in PHRASINGS.items()
            for phrasing in range(len(phrasings))
        ]
        return about_people + [item.sentence() for item in self.items]


def make_world(seed: int = 0, num_people: int = 400) -> World:
    """
    Makes a world. The same arguments give the same world on every machine.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of a generator of its own: no global random state is read or written.
        num_people (`int`, *optional*, defaults to `400`):
            Number of people, of whom every second one may be mentioned in fine-tuning.

    Returns:
        [`World`]: The people and the items.
    """
    rng = random.Random(seed)
    names = rng.sample([f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES], num_people)
    people = tuple(
        Person(name, {attribute: rng.choice(values) for attribute, values in VALUES.items()}, mentioned=i % 2 == 0)
        for i, name in enumerate(names)
    )
    items = []
    for kind, nouns in ITEMS.items():
        shuffled = rng.sample(nouns, len(nouns))
        items += [Item(noun, kind, mentioned=i % 5 != 0) for i, noun in enumerate(shuffled)]
    return World(people, tuple(items))
