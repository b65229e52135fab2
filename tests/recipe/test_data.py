"""Loading: what comes from a hub id, a folder or a file is whole, in TRL's shape, or refused in one line."""

import glob
import json

import pytest
from conftest import one_line, tulu_row
from datasets import Dataset, DatasetDict
from trl import DatasetMixtureConfig, SFTConfig
from trl.scripts.utils import DatasetConfig

from hft_trl.errors import HFTError
from hft_trl.recipe import parse_stage
from hft_trl.recipe.loading import check_apart, load_mixture, load_split
from hft_trl.saved_models.digests import mixture_parts


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_file_gives_its_rows_and_has_no_split_but_train(tmp_path, tulu, suffix):
    path = tmp_path / f"chats.{suffix}"
    tulu.to_parquet(path) if suffix == "parquet" else tulu.to_json(path)
    assert load_split(str(path)).to_list() == tulu.to_list()
    assert load_split(str(path), "train[:2]+train[2:3]").to_list() == tulu.to_list()[:3]
    for split in ("test", "train_prefs[:3]", "train+test"):
        with pytest.raises(HFTError) as error:
            load_split(str(path), split)
        assert (
            f"is one file, whose only split is train, but the split is {split!r}: give parts, such as train[:95%]"
            in one_line(error)
        )


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
        ("missing.jsonl", "train", ["missing.jsonl", "does not exist as a file or folder"]),
        ("./missing", "train", ["./missing", "does not exist as a file or folder"]),
        ("tests/missing", "train", ["tests/missing", "does not exist as a file or folder"]),
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
    tulu.save_to_disk(tmp_path / "one")
    with pytest.raises(HFTError, match=r"split 'test'.*the splits are \['train'\]"):
        load_split(str(tmp_path / "one"), "test")


def test_a_file_of_another_kind_and_an_empty_one_are_refused(tmp_path):
    (tmp_path / "chats.txt").write_text("hello")
    with pytest.raises(HFTError, match=r"chats\.txt' is no \.jsonl, \.json or \.parquet file"):
        load_split(str(tmp_path / "chats.txt"))
    Dataset.from_list([tulu_row(0)]).select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(HFTError, match=r"empty\.parquet.* corresponds to no data"):
        load_split(str(tmp_path / "empty.parquet"))


@pytest.mark.parametrize("text", ["", "{not json", '{"messages": 1}\n{"messages": "x"}\n[]\n'])
def test_a_file_that_is_no_json_is_named(tmp_path, text):
    (tmp_path / "broken.jsonl").write_text(text)
    with pytest.raises(HFTError) as error:
        load_split(str(tmp_path / "broken.jsonl"))
    assert "broken.jsonl" in one_line(error)


@pytest.mark.parametrize("text", ["", "{not json"])
def test_a_broken_part_of_a_folder_or_a_mixture_is_one_line(tmp_path, text):
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(HFTError, match=r"dataset .* cannot be read: ") as error:
        load_split(str(tmp_path))
    one_line(error)
    with pytest.raises(HFTError, match="the mixture of data sets cannot be read: ") as error:
        load_mixture(DatasetMixtureConfig([DatasetConfig(path=str(tmp_path))]), "train")
    one_line(error)


def test_a_path_with_a_pattern_in_it_is_that_path(tmp_path, monkeypatch):
    """`chats[1].jsonl` as a pattern is another file, `chats1.jsonl`."""
    folder = tmp_path / "of [me]"
    folder.mkdir()
    for name in ("chats[1].JSONL", "chats1.JSONL"):
        (folder / name).write_text(json.dumps({"text": name}))
    monkeypatch.chdir(folder)
    assert load_split("chats[1].JSONL")[0] == {"text": "chats[1].JSONL"}
    with pytest.raises(HFTError, match="which datasets cannot read: rename it"):
        load_split(".")


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


def test_a_test_split_of_a_mixture_is_apart_from_what_is_trained_and_the_same_in_every_call(tmp_path):
    rows = Dataset.from_dict({"prompt": [f"p{n}" for n in range(50)], "completion": ["c"] * 50})
    rows.to_json(tmp_path / "rows.jsonl")
    part = DatasetConfig(path="json", data_files=str(tmp_path / "rows.jsonl"))
    mixture = DatasetMixtureConfig(datasets=[part], test_split_size=0.2)
    train, test, again = (load_mixture(mixture, split)["prompt"] for split in ("train", "test", "test"))
    assert (len(train), len(test), test[:]) == (40, 10, again[:])
    assert {*train, *test} == {f"p{n}" for n in range(50)}


def parts(flags):
    stage, _ = parse_stage("sft", SFTConfig, flags)
    stage.load_data()
    return stage.train_dataset, stage.eval_dataset


def test_evaluation_rows_are_loaded_where_an_eval_strategy_asks_for_them(tmp_path, tulu):
    path = tmp_path / "chats.jsonl"
    tulu.to_json(path)
    flags = ["--model_name_or_path", "demo", "--output_dir", str(tmp_path / "out"), "--dataset_name", str(path)]
    assert [len(part or ()) for part in parts(flags)] == [len(tulu), 0]
    flags += ["--eval_strategy", "epoch"]
    with pytest.raises(HFTError, match="is one file"):
        parts(flags)
    flags += ["--dataset_train_split", "train[:30]", "--dataset_test_split", "train[30:]"]
    assert [len(part) for part in parts(flags)] == [30, 2]


def test_a_folder_with_files_of_two_kinds_is_named_with_what_only_some_of_them_have(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"chosen": "x", "rejected": "y"}\n')
    with pytest.raises(HFTError, match=r"its files differ, there are 2 new columns .*chosen"):
        load_split(str(tmp_path))


@pytest.mark.parametrize(
    ("split", "eval_split"),
    [
        *[("train", "train"), ("train", "train[9:]"), ("train[:9]", "train")],
        *[("train[:50%]", "train[40%:]"), ("train[:5]+train[20:]", "train[-1:]"), ("train[:-3]", "train[-4:]")],
    ],
)
def test_rows_that_are_trained_on_are_not_evaluated_on(tmp_path, tulu, split, eval_split):
    path = tmp_path / "chats.jsonl"
    tulu.to_json(path)
    tulu.save_to_disk(tmp_path / "saved")
    for source in (path, tmp_path / "saved"):
        with pytest.raises(HFTError) as error:
            check_apart(str(source), split, eval_split)
        assert f"eval_split {eval_split!r} has rows of split {split!r}" in one_line(error)
        check_apart(str(source), "train[:95%]", "train[95%:]")
        check_apart(str(source), "train[5:9]+train[20:]", "train[:5]+train[9:20]")
        with pytest.raises(HFTError, match=r"splits 'train\[9' and 'train' cannot be set up"):
            check_apart(str(source), "train[9", "train")
    check_apart("org/hub", "train", "test")  # nothing is loaded


def test_a_card_names_the_files_of_a_mixture_and_no_data_set_on_the_hub_called_json(tmp_path, tulu):
    tulu.to_json(tmp_path / "chats.jsonl")
    config = tmp_path / "mixture.yaml"
    config.write_text(f"datasets: [{{path: json, data_files: {tmp_path / 'c*.jsonl'}}}, {{path: org/chats}}]\n")
    flags = ["--model_name_or_path", "demo", "--output_dir", str(tmp_path / "out"), "--config", str(config)]
    stage, _ = parse_stage("sft", SFTConfig, flags)
    assert stage.data_names == [str(tmp_path / "chats.jsonl"), "org/chats"]
    tulu.to_json(tmp_path / "chats-2.jsonl")  # a card would list thousands of files
    assert stage.data_names == [str(tmp_path), "org/chats"]


def test_a_part_of_a_mixture_may_be_a_file_as_a_data_set_may(tmp_path, tulu):
    """And its content is compared when a run resumes, as that of TRL's form is."""
    found = []
    for number, keys in enumerate(("path: '{}'", "path: json, data_files: '{}'")):
        path = tmp_path / "chats[1].jsonl"
        tulu.to_json(path)
        config = tmp_path / "mixture.yaml"
        config.write_text(f"datasets: [{{{keys.format(path if number == 0 else glob.escape(str(path)))}}}]\n")
        flags = ["--model_name_or_path", "demo", "--output_dir", str(tmp_path / "out"), "--config", str(config)]
        stage, _ = parse_stage("sft", SFTConfig, flags)
        stage.load_data()
        assert len(stage.train_dataset) == len(tulu)
        assert stage.data_names == [str(path)]
        found.append(mixture_parts(stage.mixture))
    assert found[0] == found[1]
    assert found[0]["datasets"][0]["content"] is not None


def test_a_mixture_is_not_evaluated_on_the_split_that_is_trained_on(tmp_path, tulu):
    tulu.to_json(tmp_path / "chats.jsonl")
    config = tmp_path / "mixture.yaml"
    config.write_text(f"datasets: [{{path: json, data_files: {tmp_path / 'chats.jsonl'}}}]\neval_strategy: epoch\n")
    flags = ["--model_name_or_path", "demo", "--output_dir", str(tmp_path / "out"), "--config", str(config)]
    with pytest.raises(HFTError, match=r"of the mixture are both 'train'.*: set test_split_size") as error:
        parts([*flags, "--dataset_test_split", "train"])
    one_line(error)
    assert [len(part) for part in parts([*flags, "--test_split_size", "0.25"])] == [24, 8]
