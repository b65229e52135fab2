"""Metrics of tasks are from 0 to 100, as the libraries say, and 0 where nothing was predicted."""

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Indel
from rouge_score.rouge_scorer import RougeScorer

from hft_trl.continual.continual_arguments import NEEDED, check_installed
from hft_trl.continual.tasks import METRICS, Row, Task, constant_score, mean_score
from hft_trl.errors import HFTError


@pytest.mark.parametrize("name", METRICS)
@given(texts=st.lists(st.tuples(st.text(), st.from_regex(r"\w+( \w+)*", fullmatch=True)), min_size=1, max_size=4))
def test_a_metric_is_a_mean_from_0_to_100_that_is_100_for_the_answers_themselves(name, texts):
    predictions, answers = zip(*texts, strict=True)
    score = mean_score(name, predictions, answers)
    alone = [mean_score(name, [prediction], [answer]) for prediction, answer in texts]
    assert score == pytest.approx(sum(alone) / len(alone))
    assert all(0 <= value <= 100 for value in alone)
    assert mean_score(name, answers, answers) == pytest.approx(100)


@pytest.mark.parametrize("name", METRICS)
def test_an_empty_prediction_scores_0(name):
    assert mean_score(name, ["", "yes"], ["yes", "yes"]) == 50
    assert mean_score(name, ["\n"], ["<STR_LIT>"]) == 0  # which reads as nothing


def test_accuracy_is_exact_but_for_white_space_around():
    assert mean_score("accuracy", [" B", "b", "B.", "B"], ["B", "B", "B", "B\n"]) == 50


def test_of_a_choice_only_the_letter_counts():
    answers = ["B\nBecause wax is smooth.", "A\nBecause it rains."]
    assert mean_score("choice_accuracy", ["B\nBecause I say so.", "C\nBecause it rains."], answers) == 50


@given(*[st.from_regex(r"\S(.*\S)?", fullmatch=True).filter(lambda text: "_LIT" not in text)] * 2)
def test_edit_similarity_counts_characters_inserted_and_deleted(prediction, answer):
    expected = 100 * (1 - Indel.distance(prediction, answer) / (len(prediction) + len(answer)))
    assert mean_score("edit_similarity", [prediction], [answer]) == pytest.approx(expected)


def test_edit_similarity_leaves_white_space_around_aside_and_reads_placeholders_as_traces_code_does():
    written = ["x = 1", 'print("a", 0)', "f(b, '')"]
    wanted = ["  x = 1\n", 'print("<STR_LIT:a>", <NUM_LIT>)', "f(<CHAR_LIT:b>, '<STR_LIT>')"]
    assert mean_score("edit_similarity", written, wanted) == 100


def test_rouge_l_is_rouge_scores_own_on_plain_english():
    answer, prediction = "The council adopts the ordinance of May.", "the ordinance is adopted by the council"
    expected = RougeScorer(["rougeL"]).score(answer, prediction)["rougeL"].fmeasure
    assert mean_score("rouge_l", [prediction], [answer]) == pytest.approx(100 * expected)


def test_rouge_l_reads_words_of_other_alphabets_whole():
    """rouge-score's own tokenizer would cut "Größe" and "Grüße" into "gr" and "e", half the same."""
    assert mean_score("rouge_l", ["Grüße"], ["Größe"]) == 0
    assert mean_score("rouge_l", ["हिन्दी भाषा"], ["हिन्दू भाषा"]) == 50


def test_rouge_l_takes_chinese_and_japanese_characters_one_by_one():
    assert mean_score("rouge_l", ["不支持"], ["支持"]) == pytest.approx(80)
    assert mean_score("rouge_l", ["東京のカフェ2店"], ["東京で、カフェ2店"]) == pytest.approx(100 * 7 / 8)


@given(*[st.text(st.characters(max_codepoint=0xFF))] * 2)
def test_rouge_l_of_western_texts_is_that_of_pythons_own_words(prediction, answer):
    """TRACE's two tasks of this metric are in English and German."""

    class Words:
        def tokenize(self, text):
            return re.findall(r"\w+", text.lower())

    expected = RougeScorer(["rougeL"], tokenizer=Words()).score(answer, prediction)["rougeL"].fmeasure
    assert mean_score("rouge_l", [prediction], [answer]) == pytest.approx(100 * expected)


def test_a_missing_library_is_said_with_what_to_install(monkeypatch):
    check_installed(NEEDED)
    for name, library in NEEDED.items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, library, None)
            check_installed(["accuracy", "sequential"])
            with pytest.raises(HFTError, match=rf"{name} needs {library}: run pip install .*-e '\.\[continual\]'"):
                check_installed(["accuracy", name])


def test_a_constant_answer_is_the_most_frequent_of_the_training_rows_and_a_letter_where_only_that_counts():
    def task(metric, train, test):
        rows = (tuple(Row("", answer) for answer in answers) for answers in (train, test))
        return Task("T", *rows, metric, 1)

    assert constant_score(task("accuracy", ["B", "A", "B "], ["A", "B", "C", "C"])) == 25
    assert constant_score(task("choice_accuracy", ["A x", "B y", "B z"], ["B other", "A x"])) == 50
    assert constant_score(task("edit_similarity", ["ab", "ab", "cd"], ["ab", "xy"])) == 50
