"""Rows: what TRL's trainers take passes whole, anything else is refused in one line that names the row."""

import pytest
from conftest import one_line, tulu_row, ultrafeedback_row
from datasets import Dataset

from hft_trl.errors import HFTError
from hft_trl.recipe.rows import preference_dataset, sft_dataset, untrained_rows


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
        ([{"role": "robot", "content": "hi"}, {"role": "assistant", "content": "ho"}], "'robot'"),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "ho"}], "'content': None"),
        ([], "list of messages"),
    ],
)
def test_a_bad_conversation_is_named_by_its_row(messages, words):
    rows = [tulu_row(0), {**tulu_row(1), "messages": messages}]
    with pytest.raises(HFTError) as error:
        sft_dataset(Dataset.from_list(rows), "chats.jsonl")
    assert "row 1 of chats.jsonl" in one_line(error)
    assert words in one_line(error)


def test_ultrafeedback_has_the_prompt_that_both_conversations_begin_with_once(ultrafeedback):
    checked = preference_dataset(ultrafeedback, "ultrafeedback")
    assert sorted(checked.column_names) == ["chosen", "prompt", "rejected"]
    for row, before in zip(checked, ultrafeedback, strict=True):
        assert row["prompt"] == [{"role": "user", "content": before["prompt"]}]
        assert row["prompt"] + row["chosen"] == before["chosen"]
        assert row["prompt"] + row["rejected"] == before["rejected"]


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
    assert preference_dataset(dataset, "prefs", drop_equal_pairs=True)["chosen"] == [rows[0]["chosen"][1:]]
    with pytest.raises(HFTError, match="every row of prefs has an empty chosen side or equal sides"):
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
    assert untrained_rows(3, packed, "chats", 4, packing=True) == 0
    untrained = Dataset.from_dict({"labels": [[-100, -100], [-100]]})
    with pytest.raises(HFTError, match="none of the 3 rows"):
        untrained_rows(3, untrained, "chats", 2, packing=True)
    with pytest.raises(HFTError, match="none of the 5 rows of chats has a token to train on within max_length 2"):
        untrained_rows(5, kept.select([]), "chats", 2)


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


@pytest.mark.parametrize(
    "row",
    [
        {"text": None},
        {"text": 3},
        {"input_ids": "hi"},
        {"input_ids": [0.5]},
        {"prompt": "hi", "completion": None},
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


SILENT, SPACE = {"role": "assistant", "content": ""}, {"role": "assistant", "content": " \n"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("good", "empty"),
    [
        ({"messages": [USER, ANSWER]}, {"messages": [USER, SILENT]}),
        ({"messages": [USER, SILENT, USER, ANSWER]}, {"messages": [USER, SILENT, USER, SPACE]}),
        ({"messages": [USER, CALLS]}, {"messages": [USER, SILENT]}),
        ({"prompt": [USER], "completion": [ANSWER]}, {"prompt": [USER], "completion": [SPACE]}),
        ({"prompt": "hi", "completion": "ho"}, {"prompt": "hi", "completion": ""}),
        ({"instruction": "hi", "output": "ho"}, {"instruction": "hi", "output": ""}),
        ({"text": "hi"}, {"text": " "}),
    ],
)
def test_rows_with_only_empty_answers_are_counted_and_left_out_in_any_form(good, empty, monkeypatch):
    lines = []
    monkeypatch.setattr("hft_trl.recipe.rows.logger.warning", lines.append)
    kept = sft_dataset(Dataset.from_list([good]), "rows")
    assert lines == []
    assert sft_dataset(Dataset.from_list([empty, good, empty]), "rows").to_list() == kept.to_list()
    assert [line.split(" have ")[0] for line in lines] == ["2 of 3 rows of rows"]
    with pytest.raises(HFTError, match="every row of rows has"):
        sft_dataset(Dataset.from_list([empty, empty]), "rows")


@pytest.mark.parametrize("form", ["text", "answers", "conversations"])
def test_pairs_with_an_empty_chosen_side_are_left_out_and_an_empty_rejected_side_stays(form, monkeypatch):
    def row(chosen: str, rejected: str) -> dict:
        if form == "text":
            return {"prompt": "hi", "chosen": chosen, "rejected": rejected}
        sides = {"chosen": [{**ANSWER, "content": chosen}], "rejected": [{**ANSWER, "content": rejected}]}
        if form == "answers":
            return {"prompt": [USER], **sides}
        return {side: [USER, *turns] for side, turns in sides.items()}

    lines = []
    monkeypatch.setattr("hft_trl.recipe.rows.logger.warning", lines.append)
    dataset = Dataset.from_list([row("", "b"), row("a", ""), row("", ""), row("a", "b")])
    kept = preference_dataset(dataset, "pairs").to_list()
    assert kept == preference_dataset(dataset.select([1, 3]), "pairs").to_list()
    assert len(kept) == 2
    assert lines == ["2 of 4 rows of pairs have an empty chosen side: left out."]
    with pytest.raises(HFTError, match="every row of pairs has an empty chosen side"):
        preference_dataset(dataset.select([0, 2]), "pairs")
