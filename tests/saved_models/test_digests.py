"""A digest changes exactly when what a setting refers to changes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from trl import DatasetMixtureConfig

from hft_trl import demo
from hft_trl.saved_models.digests import content_digest, mixture_parts, model_digest, named_files, start_model


@pytest.fixture
def saved(tmp_path, tokenizer):
    model = tiny_llama(len(tokenizer))
    for name, size in (("whole", "1GB"), ("shards", "20KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path, model


def test_a_models_digest_is_of_what_answers(saved):
    """
    The same tensors in other shards, beside folders of one's own, have the same digest; other weights, or another
    template, have another.
    """
    folder, model = saved
    whole, shards = folder / "whole", folder / "shards"
    assert len(list(shards.glob("*.safetensors"))) > 1
    for name in ("my_tokens", "vocab_before", "chat_templates"):
        (shards / name).mkdir()
    before = model_digest(whole)
    assert model_digest(shards) == before
    (shards / "chat_template.jinja").write_text("{{ messages }}")
    templated = model_digest(shards)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(shards, max_shard_size="20KB")
    assert len({before, templated, model_digest(shards)}) == 3


def test_a_start_models_weights_and_files_are_told_apart(saved):
    folder, model = saved
    whole, shards = str(folder / "whole"), str(folder / "shards")
    before = start_model(whole, "main")
    assert start_model(shards, "main") == before
    (folder / "shards" / "README.md").write_text("notes")  # as each run writes one
    assert start_model(shards, "main") == before
    (folder / "shards" / "chat_template.jinja").write_text("{{ messages }}")
    assert start_model(shards, "main")["weights"] == before["weights"]
    assert start_model(shards, "main")["files"] != before["files"]
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(whole)
    assert start_model(whole, "main")["files"] == before["files"]
    assert start_model(whole, "main")["weights"] != before["weights"]


def test_a_model_that_is_not_trained_yet_has_no_digest(tmp_path):
    assert start_model(str(tmp_path), "main") == {"weights": None, "files": None}
    assert start_model(str(tmp_path / "a" / "b"), "main")["weights"] is None


def test_a_hub_id_stands_for_the_commit_that_the_cache_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert start_model("org/model", "main")["model_revision"] == "main"
    commit = "0123456789" * 4
    folder = tmp_path / "models--org--model"
    for path, text in (("refs/main", commit), (f"snapshots/{commit}/config.json", "{}")):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
    assert start_model("org/model", "main")["model_revision"] == commit
    assert start_model("org/model", commit)["model_revision"] == commit
    assert start_model("org/model", "v2")["model_revision"] == "v2"


def test_files_and_tokenizers_that_settings_name_count_by_their_content(tmp_path):
    template, tokenizer = tmp_path / "t.jinja", tmp_path / "tokenizer"
    template.write_text("one")
    shutil.copytree(demo.MODEL, tokenizer)
    settings = {
        "chat_template": str(template),
        "chat_template_path": str(tokenizer),
        "seed": 1,
        "optim": "adamw_torch",
    }
    settings |= {"run_name": "x" * 5000, "empty": "", "method": "hft"}
    before = named_files(settings)
    assert {key: value for key, value in before.items() if not key.endswith("_content")} == {
        "chat_template": "t.jinja",
        "chat_template_path": "tokenizer",
    }
    assert len(before) == 4
    assert named_files(settings) == before
    template.write_text("two")
    changed = named_files(settings)
    assert {key for key in before if before[key] != changed[key]} == {"chat_template_content"}
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    assert named_files(settings)["chat_template_path_content"] != before["chat_template_path_content"]


def test_names_and_bytes_of_a_folder_are_told_apart(tmp_path):
    """Also where they would be the same characters in a row, and a file of the same name lies elsewhere."""
    folders = [{"ab": "c"}, {"a": "bc"}, {"a": "b", "c": ""}, {"x/a": "bc"}, {"x/a": "1", "y/a": "2"}]
    for number, files in enumerate([*folders, {"x/a": "2", "y/a": "1"}, {"x/y/a": "1", "y/a": "2"}]):
        for name, text in files.items():
            path = tmp_path / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    digests = [content_digest(folder) for folder in tmp_path.iterdir()]
    assert len({*digests}) == len(digests) == 7
    shutil.copytree(tmp_path / "4", tmp_path / "copy")
    assert content_digest(tmp_path / "copy") == content_digest(tmp_path / "4")
    shutil.copy(tmp_path / "0" / "ab", tmp_path / "ab")
    assert content_digest(tmp_path / "ab") == content_digest(tmp_path / "0")  # a file alone
    assert content_digest(tmp_path / "nothing") is None


def test_a_file_in_the_home_folder_is_read_as_texts_of_retention_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "texts.txt").write_text("one")
    assert content_digest(Path("~/texts.txt")) == content_digest(tmp_path / "texts.txt")
    assert content_digest(Path("~nobody-of-this-name/texts.txt")) is None


@pytest.mark.parametrize(
    "part",
    [
        {"path": "json", "data_files": "one.jsonl"},
        {"path": "json", "data_files": "*.jsonl"},
        {"path": "json", "data_files": ["two.jsonl", "one.jsonl"]},
        {"path": "json", "data_files": {"train": "one.jsonl"}},
        {"path": "json", "data_files": {"train": ["one.jsonl", "two.jsonl"]}},
        {"path": "json", "data_dir": "."},
        {"path": "here"},
        {"path": "here", "data_files": "one.jsonl"},
    ],
    ids=json.dumps,
)
def test_each_part_of_a_mixture_counts_by_its_files(tmp_path, monkeypatch, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").symlink_to(".")
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text(name)

    def parts(**more):
        return mixture_parts(DatasetMixtureConfig([{**part, **more}, {"path": "org/data"}]))

    before = parts()
    assert parts() == before
    assert before["datasets"][0]["content"] is not None
    assert before["datasets"][1]["content"] is None
    assert parts(split="test") != before
    assert parts(columns=["messages"]) != before
    (tmp_path / "one.jsonl").write_text("other")
    assert parts()["datasets"][0]["content"] != before["datasets"][0]["content"]


@pytest.mark.parametrize(
    "part",
    [
        {"path": "json", "data_files": "{}/one.jsonl"},
        {"path": "json", "data_files": {"train": ["{}/*.jsonl", "https://host/two.jsonl"]}},
        {"path": "json", "data_dir": "{}"},
        {"path": "{}"},
    ],
    ids=json.dumps,
)
def test_parts_of_a_mixture_may_move_with_a_run(tmp_path, part):
    """Data that moved with the run is the same data. A URL stays as it is."""
    found = []
    for folder in ("a/data", "b/data"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "one.jsonl").write_text("one")
        moved = json.loads(json.dumps(part).replace("{}", str(tmp_path / folder)))
        found.append(mixture_parts(DatasetMixtureConfig([moved])))
    assert found[0] == found[1]
    assert json.dumps(found[0]).count("https://host/") == json.dumps(part).count("https://host/")
