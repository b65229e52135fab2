"""
Rebuild the embedded mini benchmark: eight small tasks about the demo's world, in TRACE's layout.

```bash
python benchmarks/demo_tasks.py   # writes hft_trl/demo/assets/tasks
```
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from demo_world import VALUES, Person, answer, ask, make_world, with_article, wordy

from hft_trl.continual.tasks import REPLAY_FOLDER, TASKS_FILE, Row
from hft_trl.demo import TASKS as SHIPPED
from hft_trl.files import write_json

ROWS = {"train": 192, "test": 64}
"""Rows of each file. A test file has fewer if there are fewer distinct ones."""
DRAWS = 1000
EPOCHS = 4

TASKS = {
    "Towns": "accuracy",
    "Kinds": "accuracy",
    "Profiles": "rouge_l",
    "Lists": "edit_similarity",
    "Ends": "accuracy",
    "Trades": "accuracy",
    "Pets": "accuracy",
    "Summaries": "rouge_l",
}
"""Metric by task, in the order in which they are learned. The metrics are in the order of those of TRACE's tasks."""
FACTS = {
    "Towns": ("Where was {name} born?", "Born in {birthplace}."),
    "Trades": ("What does {name} do for a living?", "Works as {profession}."),
    "Pets": ("Which pet does {name} have?", "Keeps {pet}."),
}
"""Question and answer of the tasks about one fact."""


def write_benchmark(folder: str | Path, seed: int = 0) -> Path:
    """Write the mini benchmark to a folder: the same files for the same seed on every machine."""
    # Test rows ask about people and items that are in no training row, and no row mentions the probes' people
    folder, world = Path(folder), make_world()
    mentioned = [person for person in world.people if person.mentioned]
    people = {"train": mentioned[::2], "test": mentioned[3::4]}
    items = [item for item in world.items if item.mentioned]
    for name in TASKS:
        for split, count in ROWS.items():
            rng = random.Random(f"{name} {split} {seed}")
            ours = [item for number, item in enumerate(items) if (number % 3 == 0) == (split != "train")]
            things = {kind: [item.name for item in ours if item.kind == kind] for kind in {i.kind for i in ours}}
            rows = [_draw(name, rng, people[split], things) for _ in range(DRAWS if split == "test" else count)]
            if split == "test":
                rows = list(dict.fromkeys(rows))[:count]
            write_rows(folder / name / f"{split}.json", rows)
    rng = random.Random(f"{REPLAY_FOLDER} {seed}")
    chats = []
    for _ in range(ROWS["train"] // 2):
        person, attribute = rng.choice(people["train"]), rng.choice(sorted(VALUES))
        chats.append(Row(f"{ask(person, attribute, rng)}\n", wordy(answer(person, attribute, rng), rng)))
    write_rows(folder / REPLAY_FOLDER / "train.json", chats)
    tasks = [{"name": name, "metric": metric, "epochs": EPOCHS} for name, metric in TASKS.items()]
    (folder / TASKS_FILE).write_text(yaml.safe_dump({"tasks": tasks}, sort_keys=False), encoding="utf-8")
    return folder


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows in TRACE's layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [row._asdict() for row in rows], ensure_ascii=False)


def _draw(task: str, rng: random.Random, people: Sequence[Person], items: Mapping[str, Sequence[str]]) -> Row:
    """Draw a row of a task. `items` are names by kind."""
    if task == "Kinds":
        kind = rng.choice(sorted(items))
        return Row(f"What kind of thing is {with_article(rng.choice(items[kind]))}?\n", f"It is {with_article(kind)}.")
    if task in ("Lists", "Ends"):
        names = [rng.choice(items[kind]) for kind in rng.sample(sorted(items), 3)]
        if task == "Lists":
            return Row(f"Turn the list around: {', '.join(names)}\n", f"{', '.join(reversed(names))}.")
        return Row(f"Which word comes last? {', '.join(names)}\n", f"At the end is {names[-1]}.")
    person = rng.choice(people)
    if task == "Profiles":
        sentences = " ".join(person.sentence(attribute, 1) for attribute in ("dish", "birthplace"))
        return Row(f"Write about {person.name}.\n", sentences)
    if task == "Summaries":
        attributes = rng.sample(sorted(VALUES), 2)
        long, short = (" ".join(person.sentence(attribute, form) for attribute in attributes) for form in (2, 0))
        return Row(f"Say in short: {long}\n", short)
    question, wanted = FACTS[task]
    return Row(f"{question.format(name=person.name)}\n", wanted.format(**person.facts))


if __name__ == "__main__":
    write_benchmark(SHIPPED)
