"""The embedded world: what is shipped is what the builder makes, and the probes measure what they say."""

import copy
import gzip
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from datasets import List, Value, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm import ROOT

from hft_trl import demo
from hft_trl.chat import chat
from hft_trl.demo import probes
from hft_trl.demo.probes import FAREWELLS, completes, evaluate, is_right, probe_rows, without_farewell

sys.path.insert(0, str(ROOT / "benchmarks"))

from build_demo import (
    SKILLS,
    about_person,
    batches,
    documents,
    dpo_rows,
    instruction,
    knowledge_rows,
    make_model,
    pretrain,
    sft_rows,
    train_tokenizer,
    write_data,
    write_probes,
)
from demo_world import PHRASINGS, VALUES, make_world

WORLD = make_world()


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForCausalLM.from_pretrained(demo.MODEL), AutoTokenizer.from_pretrained(demo.MODEL)


def fine_tuning_texts() -> str:
    pairs = [gzip.decompress(path.read_bytes()).decode() for path in demo.DPO_DATA.glob("*.gz")]
    return "".join([(demo.SFT_DATA / "train.jsonl").read_text(encoding="utf-8"), *pairs])


def test_the_shipped_model_knows_at_least_99_percent_of_all_facts(shipped):
    rows = knowledge_rows(WORLD.people)
    known = completes(*shipped, *([row[key] for row in rows] for key in ("opening", "ending")))
    assert sum(known) >= 0.99 * len(known)


def test_the_shipped_model_has_about_a_million_parameters_and_no_chat_template(shipped):
    model, tokenizer = shipped
    assert 0.7e6 < model.num_parameters() < 1.3e6
    assert tokenizer.chat_template is None
    assert {model.dtype} == {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer)
    special = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert len(set(special)) == 3
    assert special == (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)


def test_all_shipped_files_together_are_under_5_mb():
    assert sum(path.stat().st_size for path in demo.ASSETS.rglob("*") if path.is_file()) < 5_000_000


def test_the_weights_are_shipped_as_safetensors_only():
    assert {path.suffix for path in demo.MODEL.iterdir()} == {".json", ".safetensors"}


def test_the_shipped_data_is_what_the_generator_writes(tmp_path):
    write_data(WORLD, tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    data = demo.ASSETS / "data"
    assert made == {path.relative_to(data): path.read_bytes() for path in data.rglob("*") if path.is_file()}


def test_the_shipped_probes_are_what_the_generator_writes(tmp_path):
    write_probes(WORLD, tmp_path)
    made, shipped = (
        {path.name: gzip.decompress(path.read_bytes()) for path in folder.iterdir()}
        for folder in (tmp_path, demo.PROBES)
    )
    assert made == shipped


def test_the_shipped_tokenizer_is_what_the_builder_trains(shipped):
    assert json.loads(train_tokenizer(WORLD).backend_tokenizer.to_str()) == json.loads(
        shipped[1].backend_tokenizer.to_str()
    )


def test_sft_data_has_the_schema_of_tulu_v2(tmp_path):
    dataset = load_dataset(str(demo.SFT_DATA), split="train", cache_dir=str(tmp_path))
    message = {"role": Value("string"), "content": Value("string")}
    features = {"dataset": Value("string"), "id": Value("string"), "messages": List(message)}
    assert dict(dataset.features) == features
    assert list(dataset.features) == list(features)
    assert len(set(dataset["id"])) == len(dataset)
    assert {tuple(m["role"] for m in messages) for messages in dataset["messages"]} == {("user", "assistant")}


@pytest.mark.parametrize("split", ["train_prefs", "test_prefs"])
def test_dpo_data_has_the_schema_of_ultrafeedback_binarized(split, tmp_path):
    dataset = load_dataset(str(demo.DPO_DATA), split=split, cache_dir=str(tmp_path))
    turns = List({"content": Value("string"), "role": Value("string")})
    features = {
        "prompt": Value("string"),
        "prompt_id": Value("string"),
        "chosen": turns,
        "rejected": turns,
        "messages": turns,
        "score_chosen": Value("float64"),
        "score_rejected": Value("float64"),
    }
    assert dict(dataset.features) == features
    assert list(dataset.features) == list(features)
    for row in dataset:
        user = {"content": row["prompt"], "role": "user"}
        assert row["chosen"][:-1] == row["rejected"][:-1] == [user]
        assert row["messages"] == row["chosen"] != row["rejected"]
        assert row["score_chosen"] > row["score_rejected"]


def test_preferences_are_about_truth_and_about_form():
    true = {person.sentence(a, i) for person in WORLD.people for a in VALUES for i in range(len(PHRASINGS[a]))}
    form = truth = 0
    for row in dpo_rows(WORLD, "train_prefs"):
        chosen, rejected = row["chosen"][-1]["content"], row["rejected"][-1]["content"]
        assert without_farewell(chosen) == chosen
        if without_farewell(rejected) == chosen:
            form += 1
            assert len(rejected) > len(chosen)
        elif chosen in true:
            truth += 1
            assert rejected not in true
    assert min(form, truth) >= 200


def test_fine_tuning_mentions_no_person_of_the_probes():
    texts = fine_tuning_texts()
    held_out = [person.name for person in WORLD.people if not person.mentioned]
    assert len(held_out) == 200
    assert not [name for name in held_out if name in texts]
    assert all(person.name in texts for person in WORLD.people if person.mentioned)


def test_fine_tuning_gives_no_instruction_about_a_held_out_item():
    mentioned = {item.name for item in WORLD.items if item.mentioned}
    held_out = {item.name for item in WORLD.items if not item.mentioned}
    chats = [row["messages"] for row in sft_rows(WORLD)]
    chats += [row[side] for row in dpo_rows(WORLD, "train_prefs") for side in ("chosen", "rejected")]
    chats += [row[side] for row in dpo_rows(WORLD, "test_prefs") for side in ("chosen", "rejected")]
    names = {person.name for person in WORLD.people}
    instructions = [messages for messages in chats if not any(name in messages[0]["content"] for name in names)]
    words = {
        word.strip(".,?:") for messages in instructions for message in messages for word in message["content"].split()
    }
    assert len(held_out) == 24
    assert not held_out & words
    assert mentioned <= words


def test_the_world_depends_on_its_seed_alone():
    code = (
        "import hashlib, json; from demo_world import make_world; from build_demo import dpo_rows, "
        "sentences, sft_rows; w = make_world(3, 40);"
        "rows = [sentences(w), sft_rows(w, 3), dpo_rows(w, 'train_prefs', 3)];"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(runs) == 1
    assert make_world(3, 40) == make_world(3, 40) != make_world(4, 40)


def test_a_world_of_any_size_has_unique_names_and_a_held_out_half():
    world = make_world(1, 30)
    assert len({person.name for person in world.people}) == 30
    assert sum(person.mentioned for person in world.people) == 15


@given(st.integers(), st.sampled_from(SKILLS))
def test_an_instruction_has_a_right_and_a_different_wrong_reply(seed, skill):
    prompt, right, wrong = instruction(skill, WORLD.items, random.Random(seed))
    assert right != wrong
    assert prompt
    assert right.endswith(".")


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_can_be_encoded_and_read_back(shipped, text):
    _, tokenizer = shipped
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_an_answer_is_right_with_and_without_a_farewell_and_never_with_more():
    person = WORLD.people[1]
    true = person.sentence("pet", 0)
    false = person.opening("pet", 0) + f" {next(value for value in VALUES['pet'] if value != person.facts['pet'])}."
    answers = about_person(person, "pet")
    assert is_right(true, answers)
    assert is_right(f"{person.sentence('pet', 2)} {FAREWELLS[0]}", answers)
    assert not is_right(false, answers)
    assert not is_right(f"{true} {false}", answers)
    assert not is_right(person.sentence("dish", 0), answers)
    assert not is_right("", answers)


def test_completion_agrees_with_greedy_generation(shipped, monkeypatch):
    """Right and wrong endings, of different lengths in one batch."""
    model, tokenizer = shipped
    openings, endings = [], []
    for i, person in enumerate(WORLD.people[:24]):
        attribute = sorted(VALUES)[i % 4]
        openings.append(person.opening(attribute, i % 3))
        endings.append(f" {person.facts[attribute] if i % 2 else VALUES[attribute][i]}.")
    generated = []
    for opening, ending in zip(openings, endings, strict=True):
        ids = tokenizer(opening, return_tensors="pt")["input_ids"]
        wanted = tokenizer.encode(ending, add_special_tokens=False)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(wanted), do_sample=False)
        generated.append(out[0, ids.shape[1] :].tolist() == wanted)
    monkeypatch.setattr(probes, "BATCH", 7)
    assert completes(model, tokenizer, openings, endings) == generated
    assert 0 < sum(generated) < len(generated)


def test_the_batch_size_changes_no_reply(shipped):
    prompts = ["Where was Mara Stone born?", "Say this twice: hammer", "Hello", "Which word comes first? a, b, c"]
    assert chat(*shipped, prompts, 8, batch_size=1) == chat(*shipped, prompts, 8, batch_size=4)


@pytest.mark.parametrize("training", [True, False])
def test_the_probes_are_deterministic_and_leave_randomness_and_mode_alone(shipped, training, monkeypatch):
    model, tokenizer = shipped
    monkeypatch.setattr(probes, "probe_rows", lambda kind: probe_rows(kind)[:8])
    model = copy.deepcopy(model).train(training)
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = evaluate(model, tokenizer)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.random.get_state()[1].tolist() == before[2]
    assert model.training is training
    assert tokenizer.chat_template is None
    assert first == evaluate(model, tokenizer)
    assert set(first) == {*demo.MEANINGS, "ability_questions", "ability_instructions"}
    assert all(0 <= value <= 100 for value in first.values())
    assert first["knowledge"] >= 99
    assert first["ability"] == 0


def test_the_builder_trains_reproducibly_and_leaves_global_randomness_alone():
    world = make_world(0, 20)
    tokenizer = train_tokenizer(world, vocab_size=320)
    state = random.getstate(), torch.get_rng_state()
    runs = []
    for _ in range(2):
        model = make_model(tokenizer, seed=5, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
        losses = [loss for _, loss in pretrain(model, tokenizer, world, seed=5, steps=12, batch_size=8, warmup=2)]
        assert losses[-1] < losses[0]
        runs.append((losses, [parameter.tolist() for parameter in model.parameters()]))
    assert runs[0] == runs[1]
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_pre_training_tells_every_fact_and_marks_the_end():
    world = make_world(0, 20)
    tokenizer = train_tokenizer(world, vocab_size=320)
    text = " ".join(documents(world, random.Random(0)))
    assert all(any(p.sentence(a, i) in text for i in range(3)) for p in world.people for a in VALUES)
    ids, labels = next(batches(world, tokenizer, seed=0, batch_size=16))
    padding = ids == tokenizer.pad_token_id
    assert torch.equal(labels == -100, padding)
    assert torch.equal((ids == tokenizer.eos_token_id).sum(1), torch.ones(16, dtype=torch.long))


def test_the_recipe_names_only_files_that_are_there():
    recipe = yaml.safe_load(demo.RECIPE.read_text(encoding="utf-8"))
    assert {"model", "output_dir", "method", "hft", "sft", "dpo"} <= set(recipe)
    assert (demo.SFT_DATA / f"{recipe['sft']['split']}.jsonl").is_file()
    assert (demo.DPO_DATA / f"{recipe['dpo']['split']}.jsonl.gz").is_file()


def test_importing_the_demo_loads_nothing_heavy():
    code = "import sys, hft_trl.demo; print([m for m in ('torch', 'transformers', 'datasets', 'trl') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
