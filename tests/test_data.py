"""Loading: what comes from a hub id, a folder or a file is whole, in TRL's shape, or refused in one line."""

import json

import pytest
from conftest import tulu_row, ultrafeedback_row
from datasets import Dataset, DatasetDict
from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from hft_trl.data import load_mixture, load_split, preference_dataset, sft_dataset, untrained_rows
from hft_trl.errors import HFTError


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_file_gives_its_rows_under_any_split_name(tmp_path, tulu, suffix):
    path = tmp_path / f"chats.{suffix}"
    tulu.to_parquet(path) if suffix == "parquet" else tulu.to_json(path)
    assert load_split(str(path)).to_list() == tulu.to_list()
    assert load_split(str(path), "train_prefs[:3]").to_list() == tulu.to_list()[:3]


def test_a_json_file_may_hold_one_list(tmp_path, tulu):
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(tulu.to_list()))
    assert load_split(str(path)).to_list() == tulu.to_list()


def test_a_folder_saved_by_datasets_gives_the_split_and_its_slices(tmp_path, tulu):
    DatasetDict({"train": tulu, "test": tulu.select(range(4))}).save_to_disk(tmp_path / "both")
    tulu.save_to_disk(tmp_path / "one")
    assert len(load_split(str(tmp_path / "both"), "test")) == 4
    assert load_split(str(tmp_path / "both"), "train[8:16]")["id"] == tulu["id"][8:16]
    assert load_split(str(tmp_path / "one"), "train[:50%]")["id"] == tulu["id"][:16]


def test_a_folder_of_data_files_is_read_by_split(tmp_path, ultrafeedback):
    ultrafeedback.to_parquet(tmp_path / "train_prefs-00000-of-00001.parquet")
    ultrafeedback.select(range(4)).to_parquet(tmp_path / "test_prefs-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train_prefs\n    path: train_prefs-*\n"
        "  - split: test_prefs\n    path: test_prefs-*\n---\n"
    )
    assert len(load_split(str(tmp_path), "test_prefs")) == 4
    with pytest.raises(HFTError) as error:
        load_split(str(tmp_path), "train")
    assert "train_prefs" in one_line(error)


def test_files_that_changed_are_read_again_also_where_a_card_names_them(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: rows.jsonl\n---\n"
    )
    for word in ("old", "new"):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"text": word}) + "\n")
        assert load_split(str(tmp_path))["text"] == [word]


@pytest.mark.parametrize(
    ("source", "split", "words"),
    [
        ("missing.jsonl", "train", ["missing.jsonl"]),
        ("./missing", "train", ["./missing", "does not exist"]),
        ("nobody/nothing", "train", ["nobody/nothing"]),
    ],
)
def test_a_missing_source_is_named(source, split, words):
    with pytest.raises(HFTError) as error:
        load_split(source, split)
    assert all(word in one_line(error) for word in words)


def test_a_missing_split_names_those_there_are(tmp_path, tulu):
    DatasetDict({"train": tulu, "test": tulu}).save_to_disk(tmp_path / "saved")
    with pytest.raises(HFTError) as error:
        load_split(str(tmp_path / "saved"), "validation")
    assert "validation" in one_line(error)
    assert "'test', 'train'" in one_line(error)


def test_a_file_of_another_kind_and_an_empty_one_are_refused(tmp_path):
    (tmp_path / "chats.txt").write_text("hello")
    with pytest.raises(HFTError, match=r"\.txt file"):
        load_split(str(tmp_path / "chats.txt"))
    Dataset.from_list([tulu_row(0)]).select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(HFTError, match="is empty"):
        load_split(str(tmp_path / "empty.parquet"))


@pytest.mark.parametrize("text", ["", "{not json", '{"messages": 1}\n{"messages": "x"}\n[]\n'])
def test_a_file_that_is_no_json_is_named(tmp_path, text):
    (tmp_path / "broken.jsonl").write_text(text)
    with pytest.raises(HFTError) as error:
        load_split(str(tmp_path / "broken.jsonl"))
    assert "broken.jsonl" in one_line(error)


def test_tulu_keeps_every_row_and_only_what_trl_reads(tulu):
    checked = sft_dataset(tulu, "tulu")
    assert checked.column_names == ["messages"]
    assert checked["messages"] == tulu["messages"]


def test_missing_columns_are_answered_with_those_found(tulu):
    with pytest.raises(HFTError) as error:
        sft_dataset(tulu.remove_columns("messages"), "tulu")
    assert "['dataset', 'id']" in one_line(error)
    with pytest.raises(HFTError) as error:
        preference_dataset(tulu, "tulu")
    assert "['dataset', 'id', 'messages']" in one_line(error)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": "hi"}], "no assistant turn"),
        ([{"role": "robot", "content": "hi"}, {"role": "assistant", "content": "ho"}], "role 'robot'"),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "ho"}], "content None"),
        ([], "list of messages"),
    ],
)
def test_a_bad_conversation_is_named_by_its_row(messages, words):
    rows = [tulu_row(0), {**tulu_row(1), "messages": messages}]
    with pytest.raises(HFTError) as error:
        sft_dataset(Dataset.from_list(rows), "chats.jsonl")
    assert "row 1 of chats.jsonl" in one_line(error)
    assert words in one_line(error)


def test_ultrafeedback_loses_its_repeated_prompt_and_keeps_the_conversations(ultrafeedback):
    checked = preference_dataset(ultrafeedback, "ultrafeedback")
    assert sorted(checked.column_names) == ["chosen", "rejected"]
    assert checked["chosen"] == ultrafeedback["chosen"]


def test_explicit_prompts_stay(ultrafeedback):
    texts = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert sorted(preference_dataset(texts, "texts").column_names) == ["chosen", "prompt", "rejected"]
    conversations = ultrafeedback.map(
        lambda row: {"prompt": row["chosen"][:1], "chosen": row["chosen"][1:], "rejected": row["rejected"][1:]},
        remove_columns=["prompt"],
    )
    assert "prompt" in preference_dataset(conversations, "explicit").column_names


def test_equal_pairs_are_refused_or_dropped_when_asked_for():
    rows = [ultrafeedback_row(0), {**ultrafeedback_row(1), "rejected": ultrafeedback_row(1)["chosen"]}]
    dataset = Dataset.from_list(rows)
    with pytest.raises(HFTError, match=r"row 1 of prefs: chosen and rejected are equal"):
        preference_dataset(dataset, "prefs")
    assert preference_dataset(dataset, "prefs", drop_equal_pairs=True)["chosen"] == [rows[0]["chosen"]]
    with pytest.raises(HFTError, match="in every row"):
        preference_dataset(dataset.select([1]), "prefs", drop_equal_pairs=True)


def test_a_side_that_does_not_end_with_the_assistant_is_refused():
    row = ultrafeedback_row(0)
    row["rejected"] = [*row["rejected"], {"role": "user", "content": "really?"}]
    with pytest.raises(HFTError, match="rejected ends with role 'user'"):
        preference_dataset(Dataset.from_list([row]), "prefs")


def test_rows_without_a_trained_token_are_counted_and_all_of_them_refused():
    kept = Dataset.from_dict({"input_ids": [[1, 2]] * 3, "labels": [[-100, 2]] * 3})
    assert untrained_rows(5, kept, "chats", 2) == 2
    packed = Dataset.from_dict({"labels": [[-100, -100, 3, 4], [-100, 2]], "seq_lengths": [[2, 2], [2]]})
    assert untrained_rows(3, packed, "chats", 4) == 1
    wrapped = Dataset.from_dict({"labels": [[-100, 3], [4, -100]]})
    assert untrained_rows(1, wrapped, "chats", 2, packing=True) == 0
    assert untrained_rows(5, wrapped, "chats", 2, packing=True) == 0
    with pytest.raises(HFTError, match="none of the 5 rows of chats has a token to train on within max_length 2"):
        untrained_rows(5, kept.select([]), "chats", 2)


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


@pytest.mark.parametrize(
    "row",
    [
        {"text": None},
        {"text": ""},
        {"text": 3},
        {"prompt": "hi", "completion": None},
        {"prompt": "hi", "completion": [ANSWER]},
        {"prompt": [USER], "completion": [USER]},
        {"prompt": [{"role": "robot", "content": "hi"}], "completion": [ANSWER]},
        {"prompt": [{"role": "user", "content": None}], "completion": [ANSWER]},
        {"conversations": [{"from": "robot", "value": "hi"}, {"from": "assistant", "value": "ho"}]},
        {"conversations": [{"from": "user", "value": "hi"}]},
    ],
)
def test_a_bad_row_of_any_format_is_named_for_sft(row):
    with pytest.raises(HFTError) as error:
        sft_dataset(Dataset.from_list([row]), "rows.jsonl")
    assert "row 0 of rows.jsonl" in one_line(error)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "hi"},
        {"prompt": "hi", "completion": "ho"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "ho"}]},
        {"input_ids": [1, 2]},
    ],
)
def test_every_format_of_trl_is_taken_for_sft(row):
    assert len(sft_dataset(Dataset.from_list([row]), "rows.jsonl")) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": None, "chosen": "a", "rejected": "b"},
        {"chosen": None, "rejected": "b"},
        {"chosen": [], "rejected": [USER, ANSWER]},
        {"chosen": "", "rejected": "b"},
        {"chosen": [USER], "rejected": [USER, ANSWER]},
        {"chosen": [USER, ANSWER], "rejected": [{"role": "user", "content": "what?"}, ANSWER]},
    ],
)
def test_a_bad_pair_of_any_format_is_named(row):
    with pytest.raises(HFTError) as error:
        preference_dataset(Dataset.from_list([row]), "pairs.jsonl")
    assert "row 0 of pairs.jsonl" in one_line(error)


def test_a_text_prompt_beside_answers_alone_becomes_the_users_turn():
    row = {"prompt": "hi", "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "hm"}]}
    assert preference_dataset(Dataset.from_list([row]), "pairs")[0]["prompt"] == [USER]


def test_splits_may_be_joined(tmp_path, tulu):
    DatasetDict({"train": tulu, "test": tulu.select(range(4))}).save_to_disk(tmp_path / "both")
    assert len(load_split(str(tmp_path / "both"), "train[:2]+test")) == 6


def test_a_mixture_gives_its_splits_and_names_what_is_missing(tmp_path, tulu):
    tulu.to_json(tmp_path / "chats.jsonl")
    part = DatasetConfig(path="json", data_files=str(tmp_path / "chats.jsonl"))
    assert len(load_mixture(DatasetMixtureConfig(datasets=[part]), "train")) == len(tulu)
    with pytest.raises(HFTError, match="test_split_size"):
        load_mixture(DatasetMixtureConfig(datasets=[part]), "test")
    with pytest.raises(HFTError, match="mixture"):
        load_mixture(DatasetMixtureConfig(datasets=[DatasetConfig(path="nobody/nothing")]), "train")
