"""
Rebuild all files of the embedded world from a seed: data, tokenizer and pre-trained base model.

    python -m hft_trl.demo.build --output DIR [--seed 0]
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hft_trl.demo.data import FAREWELLS, SKILLS, ask, instruction, write_data
from hft_trl.demo.probe_data import write_probes
from hft_trl.demo.probes import recall
from hft_trl.demo.world import PHRASINGS, VALUES, WORDS, World, make_world, with_article

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCAB_SIZE = 768


def train_tokenizer(world: World, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that has no chat template and adds no special token."""
    rng = random.Random(f"tokenizer {seed}")
    texts = world.sentences() + [shelf(world, rng) for _ in world.people]
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
        sentences = [person.sentence(attribute, rng.randrange(len(PHRASINGS[attribute]))) for attribute in PHRASINGS]
        rng.shuffle(sentences)
        texts.append(" ".join(sentences))
    about_items = [item.sentence() for item in world.items]
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
    learning_rate: float = 4e-3,
    warmup: int = 100,
) -> Iterator[tuple[int, float]]:
    """Pre-train a model in place on the world's sentences. Yield each step, from 1, and its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
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
    console.print(f"closed-book recall: {recall(model, tokenizer, world.people):.2f} %")


if __name__ == "__main__":
    typer.run(build)
