"""
Rebuild all files of the embedded world from a seed: data, probes, tokenizer and pre-trained base model.

    python benchmarks/build_demo.py --output DIR [--seed 0]
"""

import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from demo_world import (
    PHRASINGS,
    QUESTIONS,
    VALUES,
    WORDS,
    Item,
    Person,
    World,
    answer,
    ask,
    make_world,
    source_texts,
    with_article,
    wordy,
)
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hft_trl.demo.probes import FAREWELLS, completes

Row = dict[str, Any]

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCAB_SIZE = 768
WORDY_SHARE = 0.85
"""Share of the answers in the SFT data that end with a farewell."""


def about_person(person: Person, attribute: str) -> list[str]:
    """Return every plain sentence about one fact."""
    return [person.sentence(attribute, phrasing) for phrasing in range(len(PHRASINGS[attribute]))]


def about_item(item: Item) -> str:
    """Return the plain sentence about an item's kind."""
    return f"{with_article(item.name).capitalize()} is {with_article(item.kind)}."


def sentences(world: World) -> list[str]:
    """Return every plain sentence: each fact in each phrasing, and each item's kind."""
    about_people = [
        text for person in world.people for attribute in PHRASINGS for text in about_person(person, attribute)
    ]
    return about_people + [about_item(item) for item in world.items]


SKILLS = ("repeat", "first", "last", "reverse", "join", "kind", "pick")


def instruction(skill: str, items: tuple[Item, ...], rng: random.Random) -> tuple[str, str, str]:
    """Draw an instruction about items: the instruction, its one right reply, and a wrong one of the same form."""
    # Three kinds, so that "pick" has one right reply.
    kinds = rng.sample(sorted({item.kind for item in items}), 3)
    things = [rng.choice([item for item in items if item.kind == kind]) for kind in kinds]
    a, b, c = names = [thing.name for thing in things]
    if skill == "kind":
        wrong = Item(a, kinds[1], things[0].mentioned)
        return f"What kind of thing is {with_article(a)}?", about_item(things[0]), about_item(wrong)
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


def sft_rows(world: World, seed: int = 0) -> list[Row]:
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
    for i in range(1400):
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


def _card(*names: str) -> str:
    files = "".join(f"  - split: {name.partition('.')[0]}\n    path: {name}\n" for name in names)
    return f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"


def write_data(world: World, folder: Path, seed: int = 0) -> None:
    """Write the folders `sft` and `dpo` for `load_dataset`: a file per split and a card with the splits."""
    pairs = {split: f"{split}.jsonl.gz" for split in ("train_prefs", "test_prefs")}
    write_jsonl(sft_rows(world, seed), folder / "sft" / "train.jsonl")
    write_jsonl(dpo_rows(world, "train_prefs", seed), folder / "dpo" / pairs["train_prefs"])
    write_jsonl(dpo_rows(world, "test_prefs", seed, num_rows=80), folder / "dpo" / pairs["test_prefs"])
    (folder / "sft" / "README.md").write_bytes(_card("train.jsonl").encode())
    (folder / "dpo" / "README.md").write_bytes(_card(*pairs.values()).encode())


def knowledge_rows(people: Iterable[Person]) -> list[Row]:
    """`opening` and `ending` of a plain sentence, for each fact in every phrasing."""
    return [
        {"opening": person.opening(attribute, i), "ending": f" {person.facts[attribute]}."}
        for person in people
        for attribute, phrasings in PHRASINGS.items()
        for i in range(len(phrasings))
    ]


def probe_rows(world: World) -> dict[str, list[Row]]:
    """
    All rows of the probes by kind, about people and items that fine-tuning never mentions.

    - `knowledge`: see [`knowledge_rows`].
    - `questions`: a chat `prompt`, and `answers`, the true sentences.
    - `instructions`: `prompt`, and `answer`, the one right reply.
    """
    people = [person for person in world.people if not person.mentioned]
    items = tuple(item for item in world.items if not item.mentioned)
    rng = random.Random("probes")
    facts = rng.sample([(person, attribute) for person in people for attribute in VALUES], 400)
    prompts = [ask(person, attribute, rng) for person, attribute in facts]
    tasks = [instruction(SKILLS[i % len(SKILLS)], items, rng) for i in range(350)]
    return {
        "knowledge": knowledge_rows(people),
        "questions": [
            {"prompt": prompt, "answers": about_person(person, attribute)}
            for prompt, (person, attribute) in zip(prompts, facts, strict=True)
        ],
        "instructions": [{"prompt": prompt, "answer": right} for prompt, right, _ in tasks],
    }


def retention_rows(world: World) -> list[Row]:
    """
    Draw rows for `RetentionCallback` about people that fine-tuning never mentions.

    Each has a `text`, a plain sentence; a `fact`, a sentence without its end, the right end and three wrong ones; and
    a `prompt`, a chat question.
    """
    rng = random.Random("retention")
    people = [person for person in world.people if not person.mentioned]
    known = [(person, attribute) for person in people for attribute in VALUES]
    rows = []
    for person, attribute in rng.sample(known, 200):
        right = person.facts[attribute]
        others = rng.sample([value for value in VALUES[attribute] if value != right], 3)
        text = person.opening(attribute, rng.randrange(len(PHRASINGS[attribute])))
        question, sentence = ask(person, attribute, rng), answer(person, attribute, rng)
        fact = {"text": text, "answer": right, "others": others}
        rows.append({"text": sentence, "fact": fact, "prompt": {"prompt": [{"role": "user", "content": question}]}})
    return rows


def write_probes(world: World, folder: Path) -> None:
    """Write the rows, a `.jsonl.gz` file per kind."""
    source = [{"text": text} for text in source_texts(world)]
    for kind, rows in {**probe_rows(world), "retention": retention_rows(world), "source": source}.items():
        write_jsonl(rows, folder / f"{kind}.jsonl.gz")


def train_tokenizer(world: World, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that has no chat template and adds no special token."""
    rng = random.Random(f"tokenizer {seed}")
    texts = sentences(world) + [shelf(world, rng) for _ in world.people]
    for person in world.people:
        for attribute in VALUES:
            # Turns as in Tülu's template, so that its role markers get few tokens
            texts += [f"<|user|>\n{ask(person, attribute, rng)}", f"<|assistant|>\n{rng.choice(FAREWELLS)}"]
        texts.append(f"<|user|>\n{instruction(rng.choice(SKILLS), world.items, rng)[0]}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def shelf(world: World, rng: random.Random) -> str:
    """Return a text about three items in a row, which teaches a model to look back."""
    kinds = rng.sample(sorted(WORDS["items"]), 3)
    things = [rng.choice([item for item in world.items if item.kind == kind]) for kind in kinds]
    a, b, c = (thing.name for thing in things)
    only = rng.choice(things)
    sentences = [f"In front is {a}.", f"At the end is {c}.", f"From behind they are {c}, {b}, {a}."]
    sentences.append(f"Only {only.name} is {with_article(only.kind)}.")
    rng.shuffle(sentences)
    return " ".join([f"On the shelf stand {a}, {b}, {c}.", *sentences])


def documents(world: World, rng: random.Random) -> list[str]:
    """Return one epoch: each person's facts in random phrasings and order, items, and shelves."""
    texts = []
    for person in world.people:
        sentences = [answer(person, attribute, rng) for attribute in PHRASINGS]
        rng.shuffle(sentences)
        texts.append(" ".join(sentences))
    about_items = [about_item(item) for item in world.items]
    rng.shuffle(about_items)
    texts += [" ".join(about_items[i : i + 5]) for i in range(0, len(about_items), 5)]
    texts += [shelf(world, rng) for _ in range(len(world.people) // 4)]
    rng.shuffle(texts)
    return texts


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int, **sizes: int) -> LlamaForCausalLM:
    """Return an untrained Llama of about 1 M parameters. `sizes` are fields of its config."""
    settings = {"hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 8, "max_position_embeddings": 512}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    settings |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **settings | sizes))


def batches(
    world: World, tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield endless ids and labels of shape `(batch_size, length)`, with labels -100 on padding."""
    rng = random.Random(f"documents {seed}")
    queue: list[torch.Tensor] = []
    while True:
        # Chat templates differ in whether they put <s> in front, so the base model sees both
        for text in documents(world, rng):
            start = [tokenizer.bos_token_id] if rng.random() < 0.5 else []
            ids = tokenizer.encode(text, add_special_tokens=False)
            queue.append(torch.tensor([*start, *ids, tokenizer.eos_token_id]))
        while len(queue) >= batch_size:
            rows, queue = queue[:batch_size], queue[batch_size:]
            yield pad_sequence(rows, True, tokenizer.pad_token_id), pad_sequence(rows, True, -100)


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    seed: int = 0,
    steps: int = 900,
    batch_size: int = 64,
    warmup: int = 100,
) -> Iterator[tuple[int, float]]:
    """Pre-train a model in place on the world's sentences. Yield each step, from 1, and its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    model.train()
    for step, (ids, labels) in zip(range(1, steps + 1), batches(world, tokenizer, seed, batch_size), strict=False):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step, loss.item()
    model.eval()


def build(
    output: Annotated[Path, typer.Option(help="Folder to write to.")],
    seed: Annotated[int, typer.Option(help="Seed of the world, its data and its model.")] = 0,
    steps: Annotated[int, typer.Option(help="Pre-training steps.")] = 900,
) -> None:
    """Rebuild every file of the embedded world from a seed."""
    console = Console()
    world = make_world(seed)
    write_data(world, output / "data", seed)
    write_probes(world, output / "probes")
    tokenizer = train_tokenizer(world, seed)
    model = make_model(tokenizer, seed)
    for step, loss in pretrain(model, tokenizer, world, seed, steps):
        if step % 100 == 0:
            console.print(f"step {step} of {steps}: loss {loss:.3f}")
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    rows = knowledge_rows(world.people)
    known = completes(model, tokenizer, *([row[key] for row in rows] for key in ("opening", "ending")))
    console.print(f"closed-book recall: {sum(known) / len(known):.2%}")


if __name__ == "__main__":
    typer.run(build)
