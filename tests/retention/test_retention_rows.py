"""Texts, facts and prompts are read from files and rows, and a mistake in one names the row and its form."""

import json
import sys

import pytest
from conftest import one_line
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from warm import ROOT

from hft_trl import HFTError
from hft_trl.demo.probes import probe_rows
from hft_trl.retention.retention_rows import choose, read_facts, read_prompts, read_texts

sys.path.insert(0, str(ROOT / "benchmarks"))

from demo_world import PHRASINGS, make_world

FACT = {"text": "The pet of Ada is", "answer": "an owl", "others": ["a cat", "a dog"]}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_and_rows_and_data_sets_give_the_same(tmp_path):
    texts = [{"text": "One."}, {"text": "Two."}]
    assert read_texts(lines(tmp_path / "t.json", texts)) == ["One.", "Two."]  # no text with brackets
    assert read_texts(lines(tmp_path / "t.jsonl", texts)) == read_texts(Dataset.from_list(texts)) == ["One.", "Two."]
    (tmp_path / "t.txt").write_text("One.\nTwo.")
    assert read_texts(str(tmp_path / "t.txt")) == ["One.\nTwo."]
    assert read_facts(lines(tmp_path / "f.jsonl", [FACT])) == read_facts([{**FACT, "id": 3}]) == [FACT]
    chat = [{"role": "user", "content": "Hello"}]
    rows = [{"messages": chat}, {"prompt": chat}, {"prompt": "Hello"}]
    assert read_prompts(lines(tmp_path / "p.jsonl", rows)) == [chat, chat, "Hello"]


def test_a_row_is_a_line_of_the_file_whatever_its_text_holds(tmp_path):
    """JSON allows line separators in strings, and some editors begin a file with a byte order mark."""
    texts = ["One.\u2028Two.\x85Three.\x0bFour.", "Five."]
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in texts)
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read_texts(tmp_path / "t.jsonl") == texts


@pytest.mark.parametrize(
    ("read", "row"),
    [
        (read_texts, {"content": "One."}),
        (read_texts, "  "),
        (read_facts, {**FACT, "others": []}),
        (read_facts, {**FACT, "others": "a cat"}),
        (read_facts, {**FACT, "others": 5}),
        (read_facts, {**FACT, "others": [FACT["answer"]]}),
        (read_facts, {"text": "The pet of Ada is", "others": ["a cat"]}),
        (read_prompts, {"question": "Hello"}),
        (read_prompts, {"messages": ["Hello"]}),
    ],
)
def test_a_row_of_another_form_is_rejected_with_its_number(read, row):
    good = {read_texts: "One.", read_facts: FACT, read_prompts: "Hello"}[read]
    with pytest.raises(HFTError, match=r"row 2 of the rows of .* each row must be a") as error:
        read([good, row])
    one_line(error)


@pytest.mark.parametrize("content", ["", "\n", "{", "[1]\n{\n"])
def test_a_file_that_is_empty_or_no_json_is_rejected_by_name(tmp_path, content):
    path = tmp_path / "f.jsonl"
    path.write_text(content)
    with pytest.raises(HFTError, match=r"f\.jsonl"):
        read_facts(path)
    with pytest.raises(HFTError, match="cannot be read"):
        read_facts(tmp_path / "none.jsonl")


@given(st.lists(st.integers(), min_size=1, unique=True), st.integers(1, 50))
def test_chosen_rows_are_distinct_in_order_and_as_many_as_asked_for(rows, most):
    chosen = choose(rows, most)
    assert len(chosen) == min(most, len(rows))
    assert [row for row in rows if row in set(chosen)] == chosen


def test_the_embedded_worlds_rows_are_true_and_about_people_that_fine_tuning_never_mentions():
    rows = probe_rows("retention")
    hidden = [person for person in make_world().people if not person.mentioned]
    true = {
        person.sentence(attribute, phrasing)
        for person in hidden
        for attribute, phrasings in PHRASINGS.items()
        for phrasing in range(len(phrasings))
    }
    assert len(rows) == 200
    assert set(read_texts([{"text": row["text"]} for row in rows])) <= true
    for fact in read_facts([row["fact"] for row in rows]):
        assert f"{fact['text']} {fact['answer']}." in true
        assert len({fact["answer"], *fact["others"]}) == 4
    names = {person.name for person in hidden}
    prompts = read_prompts([row["prompt"] for row in rows])
    assert all(any(name in prompt[0]["content"] for name in names) for prompt in prompts)


@pytest.mark.parametrize("read", [read_texts, read_facts, read_prompts])
def test_a_missing_or_empty_file_of_rows_is_not_called_invalid_json(tmp_path, read):
    name = read.__name__.removeprefix("read_")
    with pytest.raises(HFTError, match=rf"^{name} '\S+rows\.jsonl' cannot be read") as error:
        read(tmp_path / "rows.jsonl")
    one_line(error)
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(HFTError, match=rf"^{name} '\S+rows\.jsonl' is empty"):
        read(tmp_path / "rows.jsonl")
