"""Layouts of public data sets: the tokens that a trainer learns are those that a user would expect, decoded."""

from datetime import datetime

import pytest
from conftest import QUIET, one_line
from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hft_trl.chat import load_tokenizer
from hft_trl.errors import HFTError
from hft_trl.recipe import layouts
from hft_trl.recipe.loading import load_split
from hft_trl.recipe.rows import preference_dataset, sft_dataset


def user(content: str, **more) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(content: str, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


KIND = {"role": "system", "content": "Be kind."}


@pytest.fixture
def pair(base, tmp_path):
    """What DPO learns of a row: its prompt, and both answers."""

    def decoded(row: dict, **options) -> tuple[str, str, str]:
        tokenizer = load_tokenizer(str(base), "tulu")
        rows = preference_dataset(Dataset.from_list([row]), "pairs", **options)
        args = DPOConfig(output_dir=str(tmp_path), **QUIET)
        [prepared] = DPOTrainer(str(base), args=args, train_dataset=rows, processing_class=tokenizer).train_dataset
        return tuple(tokenizer.decode(prepared[column]) for column in ("prompt_ids", "chosen_ids", "rejected_ids"))

    return decoded


@pytest.fixture
def learned(base, tmp_path):
    """What SFT reads of a row, and which of it it learns."""

    def decoded(row: dict) -> tuple[str, str]:
        tokenizer = load_tokenizer(str(base), "tulu")
        rows = sft_dataset(Dataset.from_list([row]), "rows")
        chats = {"messages", "prompt"} & set(rows.column_names) and not isinstance(rows[0].get("prompt"), str)
        args = SFTConfig(output_dir=str(tmp_path), assistant_only_loss=bool(chats), **QUIET)
        [prepared] = SFTTrainer(str(base), args=args, train_dataset=rows, processing_class=tokenizer).train_dataset
        trained = [token for token in prepared["labels"] if token != -100]
        return tokenizer.decode(prepared["input_ids"]), tokenizer.decode(trained)

    return decoded


Q, GOOD, BAD = "<|user|>\nWhich?\n<|assistant|>\n", "This.</s>", "No idea.</s>"
SYSTEM = "<|system|>\nBe kind.\n"
FIRST = "<|user|>\nHello\n<|assistant|>\nGood day.</s>\n"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        # Intel/orca_dpo_pairs, and with its question under other names
        ({"system": "Be kind.", "question": "Which?", "chosen": "This.", "rejected": "No idea."}, SYSTEM + Q),
        ({"system": "", "question": "Which?", "chosen": "This.", "rejected": "No idea."}, Q),
        ({"system": "Be kind.", "input": "Which?", "chosen": "This.", "rejected": "No idea."}, SYSTEM + Q),
        ({"system": "Be kind.", "prompt": "Which?", "chosen": "This.", "rejected": "No idea."}, SYSTEM + Q),
        # Alpaca's columns
        ({"instruction": "Which?", "history": [], "chosen": "This.", "rejected": "No idea."}, Q),
        # The prompt once: repeated in the sides as messages, as text, at their beginning, and with other ids
        (
            {
                "prompt": [user("Which?")],
                "chosen": [user("Which?"), assistant("This.")],
                "rejected": [user("Which?"), assistant("No idea.")],
            },
            Q,
        ),
        (
            {
                "prompt": "Which?",
                "chosen": [KIND, user("Which?"), assistant("This.")],
                "rejected": [KIND, user("Which?"), assistant("No idea.")],
            },
            SYSTEM + Q,
        ),
        (
            {
                "prompt": [user("Hello")],
                "chosen": [user("Hello"), assistant("Good day."), user("Which?"), assistant("This.")],
                "rejected": [user("Hello"), assistant("Good day."), user("Which?"), assistant("No idea.")],
            },
            FIRST + Q,
        ),
        (
            {
                "chosen": [
                    user("Hello"),
                    assistant("Good day.", id="c"),
                    user("Which?", id="d"),
                    assistant("This.", id="e"),
                ],
                "rejected": [
                    user("Hello"),
                    assistant("Good day.", id="r"),
                    user("Which?"),
                    assistant("No idea.", model="m"),
                ],
            },
            FIRST + Q,
        ),
        ({"prompt": "Which?", "chosen": [assistant("This.")], "rejected": [assistant("No idea.")]}, Q),
        ({"prompt": [user("Which?")], "chosen": "This.", "rejected": "No idea."}, Q),
        # ShareGPT's fields, in both sides, and LLaMA-Factory's pairs of single messages
        (
            {
                "chosen": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This."}],
                "rejected": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "No idea."}],
            },
            Q,
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Which?"}],
                "chosen": {"from": "gpt", "value": "This."},
                "rejected": {"from": "gpt", "value": "No idea."},
            },
            Q,
        ),
        # Plain text under TRL's names stays plain text
        ({"prompt": "Which? ", "chosen": "This.", "rejected": "No idea."}, "Which? "),
    ],
)
def test_what_dpo_learns_is_the_answers_after_the_whole_prompt_once(pair, row, prompt):
    assert pair(row) == (prompt, GOOD, BAD)


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"instruction": "Which?", "input": "", "output": "This."}, Q + GOOD),
        (
            {"instruction": "Which?", "input": "This or that", "output": "This.", "system": "Be kind."},
            SYSTEM + "<|user|>\nWhich?\n\nThis or that\n<|assistant|>\n" + GOOD,
        ),
        ({"instruction": "Which?", "context": None, "response": "This.", "category": "qa"}, Q + GOOD),
        ({"system_prompt": "Be kind.", "question": "Which?", "response": "This."}, SYSTEM + Q + GOOD),
        ({"instruction": "Which?", "output": "This.", "history": None}, Q + GOOD),
        ({"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This."}]}, Q + GOOD),
        ({"messages": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This."}]}, Q + GOOD),
        ({"messages": [user("Which?", id="1"), {"role": "gpt", "content": "This."}]}, Q + GOOD),
        ({"conversation": [user("Which?"), assistant("This.")], "language": "English"}, Q + GOOD),
        ({"system": "Be kind.", "conversations": [user("Which?"), assistant("This.")]}, SYSTEM + Q + GOOD),
        ({"system": "Be rude.", "messages": [KIND, user("Which?"), assistant("This.")]}, SYSTEM + Q + GOOD),
        ({"prompt": [user("Which?")], "completion": [user("Which?"), assistant("This.")]}, Q + GOOD),
        ({"prompt": "Which?", "completion": [assistant("This.")]}, Q + GOOD),
        ({"prompt": "Which?", "response": "This."}, Q + GOOD),
        ({"prompt": "Which? ", "completion": "This."}, "Which? " + GOOD),
    ],
)
def test_what_sft_learns_is_the_answer_after_all_that_asks_for_it(learned, row, read):
    assert learned(row) == (read, GOOD)


def test_a_text_column_is_read_as_text_beside_alpacas_columns(learned):
    row = {"instruction": "Which?", "input": "", "output": "This.", "text": "Q: Which? A: This."}
    assert learned(row) == ("Q: Which? A: This.</s>",) * 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, "a recipe reads pairs: give a good answer as chosen"),
        ({"prompt": "a", "response_0": "b", "response_1": "c"}, "Rename the columns"),
        ({"task": "a", "chosen": "b", "rejected": "c"}, "no column prompt"),
        (
            {"prompt": [user("a")], "chosen": [user("b"), assistant("c")], "rejected": [user("b"), assistant("d")]},
            "prompt",
        ),
        (
            {"chosen": [user("a"), user("b"), assistant("c")], "rejected": [user("a"), user("d"), assistant("e")]},
            "'user'",
        ),
        ({"question": "", "chosen": "b", "rejected": "c"}, "there is no prompt"),
        (
            {
                "prompt": [KIND, user("a")],
                "chosen": [user("a"), assistant("c")],
                "rejected": [user("a"), assistant("d")],
            },
            "is not the prompt: give only the answers",
        ),
        ({"question": "a", "history": [["b", "e"]], "chosen": "c", "rejected": "d"}, "give all turns as messages"),
        ({"prompt": "a", "history": [["b", "e"]], "chosen": "c", "rejected": "d"}, "give all turns as messages"),
        # Anthropic/hh-rlhf
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "trl-lib/hh-rlhf"),
        ({"system": [{"x": 1}], "question": "a", "chosen": "c", "rejected": "d"}, "message 0"),
    ],
)
def test_pairs_that_hold_no_prompt_or_no_pair_are_rejected_with_the_fix(row, words):
    with pytest.raises(HFTError) as error:
        preference_dataset(Dataset.from_list([row]), "pairs.jsonl")
    assert words in one_line(error)
    assert "pairs.jsonl" in one_line(error)


def test_completions_that_are_labelled_good_or_bad_are_rejected_for_sft():
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "label": False}])
    with pytest.raises(HFTError, match="keep the rows whose label is true"):
        sft_dataset(rows, "kto.jsonl")


def test_nothing_is_added_to_messages_that_a_file_keeps_in_structs(tmp_path):
    """Parquet gives all messages of a column the same keys, and all arguments, with None where there was none."""
    call = {"type": "function", "function": {"name": "look", "arguments": {"city": "Ghent"}}}
    other = {"type": "function", "function": {"name": "roll", "arguments": {"sides": 6}}}
    asks = [[user("Weather?"), assistant(None, tool_calls=[each])] for each in (call, other)]
    tools = [[{"name": "look", "city": "string"}], [{"name": "roll", "sides": "integer"}]]
    rows = [{"messages": messages, "tools": each} for messages, each in zip(asks, tools, strict=True)]
    Dataset.from_list(rows).to_parquet(tmp_path / "calls.parquet")
    stored = load_dataset("parquet", data_files=str(tmp_path / "calls.parquet"), split="train")
    assert "tool_calls" in stored[0]["messages"][0]
    read = sft_dataset(stored, "calls")
    assert read[0]["messages"] == [user("Weather?"), assistant("", tool_calls=[call])]
    assert read["tools"] == tools


def test_columns_that_are_not_used_are_named_in_one_line(monkeypatch):
    lines = []
    monkeypatch.setattr("hft_trl.recipe.rows.logger.warning", lines.append)
    row = {"id": "1", "source": "x", "messages": [user("a", score=1), assistant("b")]}
    sft_dataset(Dataset.from_list([row]), "chats")
    assert lines == ["chats: the columns id, source are not used."]
    lines.clear()
    sft_dataset(Dataset.from_list([{"messages": [user("a"), assistant("b")]}]), "chats")
    assert lines == []


def test_rows_that_another_version_read_are_not_reused(tmp_path, monkeypatch):
    """datasets caches what was read, by a fingerprint that changes with the reader and not from run to run."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "Which?", "output": "This."}\n')

    def read() -> str:
        rows = sft_dataset(load_dataset("json", data_files=str(path), split="train"), "rows")
        return rows.cache_files[0]["filename"]

    first = read()
    assert read() == first
    monkeypatch.setattr(layouts, "package_version", lambda _: "another")
    assert read() != first


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Which day is this?", "input": "2026-01-31", "output": "Saturday"},
        {"conversations": [{"from": "human", "value": "2026-01-31"}, {"from": "gpt", "value": "2026-02-01"}]},
        {"messages": [user("Hi"), assistant("Ho")], "tools": [{"function": {"name": "f", "default": "2026-01-31"}}]},
    ],
)
def test_texts_that_the_reader_of_json_makes_dates_of_are_refused(row, tmp_path):
    """They would be learned as `2026-01-31 00:00:00`, or as a number of milliseconds."""
    Dataset.from_list([row]).to_json(file := tmp_path / "rows.jsonl")
    with pytest.raises(
        HFTError, match=r"the column (input|conversations|tools) holds dates.*save the rows as a \.parquet"
    ) as error:
        sft_dataset(load_split(str(file)), "rows")
    one_line(error)
    Dataset.from_list([row]).to_parquet(file := tmp_path / "rows.parquet")
    assert len(sft_dataset(load_split(str(file)), "rows")) == 1


@pytest.mark.parametrize("time", [datetime(2023, 4, 9), "noon"])
def test_the_time_of_a_message_is_not_read_and_no_mistake(time):
    """Each turn of WildChat has one."""
    turns = [user("Hi", timestamp=time), assistant("Ho", timestamp=time)]
    [row] = sft_dataset(Dataset.from_list([{"conversation": turns}]), "rows")
    assert row == {"messages": [user("Hi"), assistant("Ho")]}


def test_a_text_in_place_of_messages_is_answered_with_their_form():
    row = {"messages": '[{"role": "user", "content": "Hi"}]'}
    with pytest.raises(HFTError, match=r"row 0 of rows is .* give a list of messages such as"):
        sft_dataset(Dataset.from_list([row]), "rows")


def test_an_input_that_is_no_text_is_refused_and_a_number_is_one():
    row = {"instruction": "Add one.", "output": "4"}
    with pytest.raises(HFTError, match=r"row 0 of rows, input is \['3'\]: it must be text"):
        sft_dataset(Dataset.from_list([{**row, "input": ["3"]}]), "rows")
    assert sft_dataset(Dataset.from_list([{**row, "input": 3}]), "rows")[0]["prompt"] == [user("Add one.\n\n3")]
