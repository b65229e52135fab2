"""
Overall performance and backward transfer are the paper's formulas, and scores.json holds no more than its rounds.
"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_continual_report import scores_of

from hft_trl.continual.rounds import Answered
from hft_trl.continual.run_folder import curves, read_scores, score_rows
from hft_trl.errors import HFTError


@st.composite
def triangles(draw):
    size = draw(st.integers(1, 8))
    return [draw(st.lists(st.floats(0, 100), min_size=t, max_size=t)) for t in range(1, size + 1)]


@given(triangles())
def test_op_and_bwt_are_the_papers_sums_with_the_denominator_t(s):
    found = curves(s)
    for t, row in enumerate(s, 1):
        assert found["op"][t - 1] == pytest.approx(sum(row[:t]) / t)
        change = sum(s[t - 1][i - 1] - s[i - 1][i - 1] for i in range(1, t))
        assert found["bwt"][t - 1] == pytest.approx(change / t)
        if t > 1:
            assert found["bwt_t_minus_1"][t - 1] == pytest.approx(change / (t - 1))
    assert found["bwt_t_minus_1"][0] is None


def test_what_is_forgotten_is_negative_and_what_comes_back_positive():
    found = curves([[80.0], [60.0, 40.0], [90.0, 40.0, 10.0]])
    assert found["op"] == pytest.approx([80, 50, 140 / 3])
    assert found["bwt"] == pytest.approx([0, -10, 10 / 3])
    assert found["bwt_t_minus_1"][1:] == pytest.approx([-20, 5])


def test_a_single_round_of_all_tasks_forgets_nothing():
    assert curves([[50.0, 70.0]]) == {"op": [60.0], "bwt": [0.0], "bwt_t_minus_1": [None]}


def answers(**scores):
    return {task: Answered(score, 0, 0) for task, score in scores.items()}


def test_a_row_holds_the_tasks_seen_by_then_and_a_model_of_its_own_keeps_its_score():
    rows = score_rows([answers(A=9), answers(A=5, B=7)])
    assert [[task.score for task in row] for row in rows] == [[9], [5, 7]]
    rows = score_rows([answers(A=9), answers(B=7)])
    assert [[task.score for task in row] for row in rows] == [[9], [9, 7]]


def test_another_file_is_refused(tmp_path):
    with pytest.raises(HFTError, match=r"has no scores\.json: give the folder"):
        read_scores(tmp_path)
    for text in ("[]", "{", '{"version": 1}'):
        (tmp_path / "scores.json").write_text(text)
        with pytest.raises(HFTError, match="cannot be read"):
            read_scores(tmp_path)
    (tmp_path / "scores.json").write_text(json.dumps({**scores_of(), "version": 2}))
    with pytest.raises(HFTError, match=r"cannot be read \(it is of version 2, not 1\)"):
        read_scores(tmp_path)
