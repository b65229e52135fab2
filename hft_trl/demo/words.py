"""The words that the small world is made of."""


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
