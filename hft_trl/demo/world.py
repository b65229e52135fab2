"""The embedded world: people and facts about them, items and their kinds, in English-like sentences."""

import random
from dataclasses import dataclass


def _split(words: str, separator: str = " ") -> tuple[str, ...]:
    return tuple(words.split(separator))


FIRST_NAMES = _split(
    "Ada Alba Anton Bela Bruno Carla Cyril Dario Dora Edgar Elsa Emil Fabian Flora Frida Gustav Hanna Hugo Ida "
    "Igor Ines Jonas Julia Karl Kira Lena Leo Linus Mara Milan Nadia Nils Olga Oskar Paula Pavel Rita Rosa Selma "
    "Simon Stella Tilda Tobias Ursula Vera Viktor Wanda Xenia Yara Zeno"
)
LAST_NAMES = _split(
    "Abelson Ackers Bellamy Bergmann Birk Calloway Castell Dahlberg Demers Dorn Eklund Engel Falk Ferrante "
    "Fleming Garland Goss Hadley Halvorsen Hart Ibarra Jansen Keller Kessler Kovacs Lambert Lindgren Lund "
    "Marchetti Mercer Morrow Nash Norling Novak Orsini Osborn Palmer Pereira Quill Ramsey Renner Rossi Sandoval "
    "Sorensen Stone Sutter Thorne Tully Ullman Valente Vance Velden Wagner Webb Winslow Yates Young Zander Zeller "
    "Zimmer"
)
TOWNS = _split(
    "Aarhus Athens Basel Bergen Bilbao Bristol Cairo Cork Dakar Dover Dublin Florence Geneva Ghent Graz Hamburg "
    "Havana Helsinki Istanbul Kyoto Leeds Lima Lisbon London Lyon Madrid Malta Milano Nairobi Naples Oslo Paris "
    "Porto Prague Quito Riga Seville Tunis Vienna Zagreb"
)
PROFESSIONS = _split(
    "actor architect baker barber beekeeper blacksmith bookbinder brewer butcher carpenter chemist clockmaker "
    "cook dancer dentist diver doctor driver editor engineer farmer gardener glazier hunter judge lawyer "
    "librarian miller miner nurse painter pilot plumber potter sailor singer tailor teacher waiter weaver"
)
PETS = _split(
    "badger beagle canary cat cheetah chicken cobra crow dog donkey duck eagle ferret finch fox frog goat goose "
    "hamster hare hedgehog horse iguana jackal kitten lizard llama magpie mouse newt otter owl parrot pig pony "
    "rabbit rat snail tortoise turtle"
)
DISHES = _split(
    "apple pie, baked beans, barley soup, beef stew, black pudding, bread and cheese, buttered toast, carrot "
    "cake, cheese pie, chicken soup, corn bread, crab salad, fish stew, fried eggs, fried rice, garlic bread, "
    "goat curry, green salad, grilled fish, honey cake, lamb curry, lemon cake, lentil soup, mashed peas, "
    "mushroom pie, noodle soup, onion soup, pea soup, pepper stew, plum cake, pork roast, potato salad, rice "
    "pudding, roast duck, rye bread, salt fish, smoked ham, spiced nuts, tomato soup, turnip stew",
    separator=", ",
)

ITEMS = {
    "tool": _split("hammer saw chisel pliers wrench shovel rake drill file axe hoe trowel clamp mallet plane"),
    "fruit": _split("apple pear plum cherry grape lemon melon peach mango fig banana apricot quince kiwi date"),
    "vegetable": _split(
        "carrot turnip leek cabbage radish spinach celery pumpkin onion potato beetroot lettuce fennel bean pea"
    ),
    "instrument": _split("flute violin trumpet drum harp guitar piano oboe cello banjo organ lute tuba fiddle zither"),
    "garment": _split("coat scarf glove shirt sock hat jacket skirt apron cloak vest boot belt sweater gown"),
    "vehicle": _split("cart wagon bicycle tram lorry ship canoe sledge train ferry barge rocket scooter van glider"),
    "bird": _split("robin sparrow heron gull wren raven stork swallow dove pigeon lark thrush puffin pelican condor"),
    "flower": _split(
        "rose tulip daisy lily violet orchid poppy lotus peony iris crocus dahlia aster jasmine primrose"
    ),
}


def with_article(noun: str) -> str:
    """Put the indefinite article before a noun: `"owl"` gives `"an owl"`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


VALUES: dict[str, tuple[str, ...]] = {
    "birthplace": TOWNS,
    "profession": tuple(with_article(noun) for noun in PROFESSIONS),
    "pet": tuple(with_article(noun) for noun in PETS),
    "dish": DISHES,
}

# Each phrasing ends where the value begins, so that a model can complete the sentence
PHRASINGS: dict[str, tuple[str, ...]] = {
    "birthplace": ("{name} was born in", "{name} comes from the town of", "The birthplace of {name} is"),
    "profession": ("{name} works as", "{name} earns a living as", "By trade, {name} is"),
    "pet": ("{name} keeps", "{name} shares the house with", "The pet of {name} is"),
    "dish": ("{name} likes to eat", "{name} never says no to", "The favourite dish of {name} is"),
}


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

    def sentences(self, attribute: str) -> list[str]:
        """Return every plain sentence about one fact."""
        return [self.sentence(attribute, phrasing) for phrasing in range(len(PHRASINGS[attribute]))]


@dataclass(frozen=True)
class Item:
    """A thing, its kind, and whether fine-tuning may mention it."""

    name: str
    kind: str
    mentioned: bool

    def sentence(self) -> str:
        """Return the plain sentence about the kind."""
        return f"{with_article(self.name).capitalize()} is {with_article(self.kind)}."


@dataclass(frozen=True)
class World:
    """People (fine-tuning may mention half of them) and items (four in five of each kind)."""

    people: tuple[Person, ...]
    items: tuple[Item, ...]

    def sentences(self) -> list[str]:
        """Return every plain sentence: each fact in each phrasing, and each item's kind."""
        about_people = [
            sentence for person in self.people for attribute in PHRASINGS for sentence in person.sentences(attribute)
        ]
        return about_people + [item.sentence() for item in self.items]


def make_world(seed: int = 0, num_people: int = 400) -> World:
    """Return the world of a seed, the same on every machine, without global random state."""
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
