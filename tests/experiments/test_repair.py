"""Repair: what is measured is what is written, and the choice keeps the rule."""

import json
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from conftest import one_line, tiny_llama
from safetensors.torch import load_file
from test_saved import tiny_moe
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft_trl import HFTConfig, HFTError, demo, half_reset, select
from hft_trl.demo.probes import probe_rows
from hft_trl.experiments import repair as module
from hft_trl.retention.meter import Meter
from hft_trl.saved_models.half_reset import average
from hft_trl.saved_models.saved_model import SavedModel

ROWS = 8
CONFIG = HFTConfig(ratio=0.5, seed=3)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Files of texts and of a task that the embedded model knows."""
    folder = tmp_path_factory.mktemp("rows")
    lines = {
        "texts": [{"text": row["text"]} for row in probe_rows("retention")[:ROWS]],
        "task": [{"prompt": row["opening"], "completion": row["ending"]} for row in probe_rows("knowledge")[:ROWS]],
    }
    for name, content in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in content))
    return {name: str(folder / f"{name}.jsonl") for name in lines}


@torch.no_grad()
def save(folder, noise) -> str:
    """Save the embedded model with noise, `noise(name)` times one that is the same in every call."""
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.add_(noise(name) * torch.randn(parameter.shape, generator=generator) * parameter.std())
    model.save_pretrained(folder, max_shard_size="1MB")
    AutoTokenizer.from_pretrained(demo.MODEL).save_pretrained(folder)
    return str(folder)


@cache
def stays_tuned() -> set[str]:
    return set(select(AutoModelForCausalLM.from_pretrained(demo.MODEL), CONFIG).trainable)


def in_the_half(name) -> bool:
    return name in stays_tuned()


# Noise of the base and of the tuned model, and the mixture in which it cancels
CASES = {
    "average 0.5": (lambda name: 1, lambda name: -1),
    "half-reset 0.5": (in_the_half, lambda name: not in_the_half(name)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, rows, tmp_path_factory):
    """What was repaired, written and recorded."""
    folder = tmp_path_factory.mktemp("case")
    base, tuned = (
        save(folder / name, noise) for name, noise in zip(("base", "tuned"), CASES[request.param], strict=True)
    )
    record = module.repair(base, tuned, folder / "out", CONFIG, **rows, weights=[0.5])
    return request.param, folder, record


def tensors(folder) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def test_the_mixture_without_noise_is_chosen(case):
    name, folder, record = case
    assert record["chosen"] == name
    assert record == json.loads((folder / "out" / "repair.json").read_text())


def test_the_choice_has_the_lowest_text_loss_within_the_tolerance(case):
    _, _, record = case
    found = {candidate["name"]: candidate for candidate in record["candidates"]}
    most = found["tuned"]["task_loss"] * 1.02
    chosen = found[record["chosen"]]
    assert chosen["task_loss"] <= most
    for candidate in found.values():
        assert candidate["task_loss"] > most or candidate["text_loss"] >= chosen["text_loss"]


def test_every_tensor_is_what_the_record_and_the_card_say(case):
    _, folder, record = case
    chosen = next(each for each in record["candidates"] if each["name"] == record["chosen"])
    base, tuned, out = (tensors(folder / part) for part in ("base", "tuned", "out"))
    card = (folder / "out" / "README.md").read_text()
    if chosen["weight"] is None:
        stays = half_reset(folder / "base", folder / "tuned", folder / "reset", CONFIG).trainable
        assert all(value.equal((tuned if key in stays else base)[key]) for key, value in out.items())
        files = {path.name for path in (folder / "reset").iterdir()} | {"repair.json"}
        assert {path.name for path in (folder / "out").iterdir()} == files
        assert (folder / "out" / "README.md").read_text() == (folder / "reset" / "README.md").read_text()
        return
    assert f"{chosen['weight']:g} times that of `{folder / 'tuned'}`" in card
    for key, value in out.items():
        assert value.equal(torch.lerp(base[key].double(), tuned[key].double(), chosen["weight"]).float()), key


def test_what_was_measured_is_what_was_written(case, rows):
    """Also of the tuned model and the base, which are the mixtures of weight 1 and 0."""
    _, folder, record = case
    found = {candidate["name"]: candidate for candidate in record["candidates"]}
    meter = Meter(AutoTokenizer.from_pretrained(demo.MODEL), rows["texts"])
    for name, path in (("base", "base"), ("tuned", "tuned"), (record["chosen"], "out")):
        model = AutoModelForCausalLM.from_pretrained(folder / path)
        assert meter.measure(model)["text_loss"] == found[name]["text_loss"]


def test_the_task_loss_is_that_of_the_answers_tokens(case, rows):
    _, folder, record = case
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    losses = []
    for line in Path(rows["task"]).read_text().splitlines():
        row = json.loads(line)
        prompt, whole = (
            tokenizer(text)["input_ids"]
            for text in (row["prompt"], row["prompt"] + row["completion"] + tokenizer.eos_token)
        )
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        losses += [-logits[place - 1, whole[place]].item() for place in range(len(prompt), len(whole))]
    chosen = next(each for each in record["candidates"] if each["name"] == record["chosen"])
    assert chosen["task_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_tolerance_that_no_mixture_keeps_leaves_the_tuned_model(rows, tmp_path):
    base = save(tmp_path / "base", lambda name: 2)
    record = module.repair(base, "demo", tmp_path / "out", CONFIG, **rows, tolerance=0)
    assert record["chosen"] == "tuned"
    before, out = tensors(demo.MODEL), tensors(tmp_path / "out")
    assert all(value.equal(before[key]) for key, value in out.items())


def test_a_type_that_rounds_the_base_has_no_half_reset(rows, tmp_path):
    tuned = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.bfloat16)
    tuned.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(demo.MODEL).save_pretrained(tmp_path / "tuned")
    record = module.repair("demo", str(tmp_path / "tuned"), tmp_path / "out", CONFIG, **rows, weights=[])
    assert [candidate["name"] for candidate in record["candidates"]] == ["base", "tuned"]
    assert tensors(tmp_path / "out")["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["tied", "fused"])
def test_a_mixture_in_memory_is_the_one_in_files(tmp_path, kind):
    """With one tensor for two modules, and with experts that are one parameter in memory and several in the files."""
    made = partial(tiny_llama, 40, num_hidden_layers=1, tie_word_embeddings=True) if kind == "tied" else tiny_moe
    made().save_pretrained(tmp_path / "base")
    model = made()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    average(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", 0.3)
    before, after = (SavedModel(str(tmp_path / name)) for name in ("base", "tuned"))
    module.mix(model, before, after, dict.fromkeys(after.parameters, 0.3))
    written = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert all(parameter.equal(written[name]) for name, parameter in model.named_parameters())


def test_rows_of_messages_need_a_template_that_marks_the_answers(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    AutoModelForCausalLM.from_pretrained(demo.MODEL).save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    with pytest.raises(HFTError, match=r"markers.*prompt and completion") as error:
        module.repair("demo", str(tmp_path / "tuned"), tmp_path / "out", CONFIG, max_rows=4)
    one_line(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"texts": None}, "--texts is missing"),
        ({"task": None}, "--task is missing.*--weight"),
        ({"weights": [0.5, 1.5]}, "weight is 1.5"),
        ({"texts": "nowhere.txt"}, "texts 'nowhere.txt'"),
        ({"task": "nowhere.jsonl"}, "dataset 'nowhere.jsonl'"),
        ({"facts": "nowhere.jsonl"}, "facts 'nowhere.jsonl'"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(rows, tmp_path, monkeypatch, given, words):
    monkeypatch.setattr(module, "_trainer", None)
    with pytest.raises(HFTError, match=words) as error:
        module.repair(str(demo.MODEL), "demo", tmp_path / "out", CONFIG, **(rows | given))
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_an_output_or_a_model_that_does_not_fit_is_rejected_before_anything_is_measured(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_trainer", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(HFTError, match="exists already"):
        module.repair("demo", "demo", tmp_path / "out", CONFIG)
    tiny_llama(64).save_pretrained(tmp_path / "other")
    with pytest.raises(HFTError, match="vocabulary"):
        module.repair("demo", str(tmp_path / "other"), tmp_path / "new", CONFIG)
    with pytest.raises(HFTError, match="out"):
        module.repair("demo", "demo", tmp_path / "out" / "notes.txt" / "new", CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
