"""
A continual run's report and the comparison of runs say what scores.json says, and nothing is drawn that is not there.
"""

import json

import pytest
from typer.testing import CliRunner

from hft_trl.cli import app
from hft_trl.continual.report import (
    compare,
    comparison_grid,
    curves_figure,
    forgetting_grid,
    matrix_figure,
    score_grid,
    write_comparison,
    write_report,
)
from hft_trl.continual.run_folder import curves
from hft_trl.errors import HFTError


def scores_of(
    approach="sequential", method="hft", matrix=((80.0,), (60.5, 40.0)), tasks=("A", "B"), model="demo", settings=None
):
    return {
        "version": 1, "approach": approach, "method": method, "model": model, "tasks": list(tasks),
        "metrics": ["accuracy"] * len(tasks), "constant_answer": [53.0] * len(tasks), "matrix": [list(row) for row in matrix], **curves(matrix),
        "settings": {"seed": 1, "test_sets": "x"} | (settings or {}),
        "probes": {"base": {"knowledge": 100.0, "other": None}},
        "retention": {"base": {"text_loss": 2.0}, "round-1": {"text_loss": 2.5}},
        "rounds": [{"name": f"round-{t}"} for t in range(1, len(matrix) + 1)],
        "empty_predictions": [[0] * len(row) for row in matrix[:-1]] + [[3] + [0] * (len(matrix[-1]) - 1)],
        "truncated_prompts": [[0] * len(row) for row in matrix],
    }  # fmt: skip


def save(folder, **scores):
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps(scores_of(**scores)))
    return folder


def test_the_matrix_is_shown_with_what_is_not_yet_seen_left_out():
    grid = score_grid(scores_of())
    assert grid.columns == ["after", "A", "B", "OP", "BWT"]
    constant, *rounds = grid.rows
    assert constant == ["constant", "53.0", "53.0", "-", "-"]
    assert rounds == [["round-1", "80.0", "-", "80.0", "+0.0"], ["round-2", "60.5", "40.0", "50.2", "-9.8"]]


def test_where_no_task_comes_after_another_there_is_no_transfer(tmp_path):
    scores = scores_of("individual", matrix=((80.0,), (80.0, 40.0)))
    assert [row[-1] for row in score_grid(scores).rows] == ["-", "-", "-"]
    assert "OP 50.2, BWT - after" in write_report(save(tmp_path / "a", approach="individual")).read_text()


def test_forgetting_is_the_change_since_a_tasks_own_round():
    rows = forgetting_grid(scores_of()).rows
    assert rows == [["A", "accuracy", "80.0", "60.5", "-19.5"], ["B", "accuracy", "40.0", "40.0", "+0.0"]]


def test_the_heat_map_has_a_number_for_every_score_and_no_other():
    (axes, _) = matrix_figure(scores_of()).axes
    assert sorted(text.get_text() for text in axes.texts) == ["40", "60", "80"]
    assert axes.images[0].get_array().mask.tolist() == [[False, True], [False, False]]


def test_the_curves_are_op_and_bwt_and_a_single_round_is_a_level():
    runs = {"a": scores_of(), "pooled $x$": scores_of("multitask", matrix=((70.0, 50.0),))}
    op, bwt = curves_figure(runs).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in op.lines}
    assert drawn["a"] == [80.0, 50.25]
    assert drawn[r"pooled \$x\$"] == [60.0, 60.0]
    assert {line.get_label(): list(line.get_ydata()) for line in bwt.lines}["a"] == [0.0, -9.75]


def test_a_report_names_its_pictures_counts_and_probes(tmp_path):
    folder = save(tmp_path / "run")
    text = write_report(folder).read_text()
    for picture in ("matrix.png", "curves.png"):
        assert f"({picture})" in text
        assert (folder / picture).stat().st_size > 5000
    assert "OP 50.2, BWT -9.8 after the last of 2 rounds" in text
    assert "3 predictions were empty" in text
    assert "- base: knowledge 100.0, other -" in text
    assert "| round-1 | 2.5000 (+0.5000) |" in text
    assert text.count("knowledge: facts about people") == 1
    with pytest.raises(HFTError, match=r"has no scores\.json"):
        write_report(tmp_path)


def test_each_run_has_a_row():
    runs = {"a": scores_of(), "b": scores_of("lora", method=None), "c": scores_of("multitask", matrix=((80.0, 70.0),))}
    assert comparison_grid(runs).rows == [
        ["a", "sequential", "HFT", "50.2", "-9.8"],
        ["b", "lora", "-", "50.2", "-9.8"],
        ["c", "multitask", "HFT", "75.0", "-"],
    ]


def test_the_command_prints_the_table_and_writes_table_and_figure(tmp_path):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", method="fft")
    result = CliRunner().invoke(app, ["continual", "compare", str(a), str(b), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "FFT" in result.output
    assert "FFT" in (tmp_path / "out" / "comparison.md").read_text()
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 5000
    result = CliRunner().invoke(app, ["continual", "compare", str(a), str(b), "--json"])
    assert json.loads(result.output)[str(a)]["op"] == [80.0, 50.25]
    assert not (tmp_path / "comparison.png").exists()
    c = save(tmp_path / "c", settings={"seed": 2})
    result = CliRunner().invoke(app, ["continual", "compare", str(a), str(b), str(c)])
    assert f"Not the same in all runs: seed: 1 ({a}), 1 ({b}), 2 ({c})" in result.output
    assert (tmp_path / "comparison.png").stat().st_size > 5000  # without --out, beside the first run
    assert f"- seed: 1 ({a}), 1 ({b}), 2 ({c})" in (tmp_path / "comparison.md").read_text()


def test_the_folder_that_holds_a_run_is_found_from_inside_of_the_run_too(tmp_path, monkeypatch):
    a = save(tmp_path / "a")
    save(tmp_path / "b", method="fft")
    monkeypatch.chdir(a)
    assert CliRunner().invoke(app, ["continual", "compare", ".", "../b"]).exit_code == 0
    assert (tmp_path / "comparison.md").is_file()
    assert [path.name for path in a.iterdir()] == ["scores.json"]


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    whole = save(tmp_path / "whole")
    assert list(compare([whole])) == [str(whole)]
    part = save(tmp_path / "part", matrix=((80.0,),))
    with pytest.raises(HFTError, match="1 rounds of 2 tasks: finish it first"):
        compare([whole, part])
    other = save(tmp_path / "other", tasks=("A", "C"))
    with pytest.raises(HFTError, match=r"other has the tasks A, C, .*whole has A, B"):
        compare([whole, other])
    with pytest.raises(HFTError, match=r"big has the model meta/big, .*whole has demo"):
        compare([whole, save(tmp_path / "big", model="meta/big")])
    with pytest.raises(HFTError, match=r"small has other test sets than .*whole"):
        compare([whole, save(tmp_path / "small", settings={"test_sets": "y"})])
    for again in (whole, f"{whole}/", tmp_path / "part" / ".." / "whole"):
        with pytest.raises(HFTError, match=r"whole/? is given twice"):
            compare([again, whole])
    with pytest.raises(HFTError, match=r"nowhere has no scores\.json"):
        compare([whole, tmp_path / "nowhere"])
    assert write_comparison(compare([whole]), tmp_path / "new").is_file()
