"""Tasks are read as TRACE released them, or from users' YAML, and whatever is missing is named in one line."""

import json

import pytest
import yaml
from conftest import write_rows

from hft_trl import demo
from hft_trl.continual.continual_recipe import parse_continual
from hft_trl.continual.tasks import TRACE, Row, read_benchmark, read_replay, read_rows, read_tasks
from hft_trl.errors import HFTError

ROW = {"prompt": "What is the stance?\nStance:\n", "answer": "hawkish"}


def write_task(folder, rows=(ROW,)):
    folder.mkdir(parents=True)
    for split in ("train", "eval", "test"):
        (folder / f"{split}.json").write_text(json.dumps(list(rows)), encoding="utf-8")


@pytest.fixture
def benchmark(tmp_path):
    """The released folder: eight tasks, in the order of the file system, and Lima."""
    for name in (*sorted(TRACE), "Lima"):
        write_task(tmp_path / name, [{"prompt": name, "answer": "支持", "id": 3}])
    return tmp_path


def test_trace_is_read_as_released_in_the_papers_order_with_its_epochs_and_metrics(benchmark):
    tasks = read_benchmark(benchmark)
    assert [(task.name, task.epochs) for task in tasks] == [
        ("C-STANCE", 5), ("FOMC", 3), ("MeetingBank", 7), ("Py150", 5),
        ("ScienceQA", 3), ("NumGLUE-cm", 5), ("NumGLUE-ds", 5), ("20Minuten", 7),
    ]  # fmt: skip
    assert {task.name: task.metric for task in tasks if task.metric != "accuracy"} == {
        "MeetingBank": "rouge_l", "Py150": "edit_similarity", "ScienceQA": "choice_accuracy", "20Minuten": "rouge_l",
    }  # fmt: skip
    assert all(task.train == task.test == (Row(task.name, "支持"),) for task in tasks)
    assert read_replay(benchmark) == (Row("Lima", "支持"),)


def test_a_benchmark_without_lima_has_no_general_data(tmp_path):
    assert read_replay(tmp_path) == ()


def test_users_tasks_name_their_files_metric_and_epochs(tmp_path):
    write_task(tmp_path / "mine")
    write_rows(tmp_path / "elsewhere" / "a.json", [Row("p", "a")])
    write_rows(tmp_path / "b.json", [Row("q", "b")])
    write_task(tmp_path / "FOMC")
    own = [
        {"name": "mine", "metric": "accuracy", "epochs": 2},
        {"name": "other", "files": {"train": "elsewhere/a.json", "test": "b.json"}, "metric": "rouge_l", "epochs": 1},
        {"name": "again", "files": "mine", "metric": "edit_similarity", "epochs": 1},
        {"name": "FOMC"},
    ]
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": own}))
    tasks = read_tasks(tmp_path / "tasks.yaml")
    assert [(task.name, task.metric, task.epochs) for task in tasks] == [
        ("mine", "accuracy", 2), ("other", "rouge_l", 1), ("again", "edit_similarity", 1), ("FOMC", "accuracy", 3)
    ]  # fmt: skip
    assert tasks[1].train == (Row("p", "a"),)
    assert tasks[1].test == (Row("q", "b"),)
    assert read_benchmark(tmp_path) == tasks


def test_missing_folders_and_files_are_named(benchmark, tmp_path):
    with pytest.raises(HFTError, match=r"nowhere.* is no folder"):
        read_benchmark(tmp_path / "nowhere")
    (benchmark / "Py150" / "test.json").unlink()
    with pytest.raises(HFTError, match=r"Py150/test.json.* cannot be read as JSON: No such file"):
        read_benchmark(benchmark)
    (benchmark / "Py150").rename(benchmark / "py")
    with pytest.raises(HFTError, match=r"no folder 'Py150' \(1 of TRACE's 8 tasks are missing\)"):
        read_benchmark(benchmark)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot be read as JSON: Expecting"),
        ("[]", "must be a JSON list"),
        (json.dumps(ROW), "must be a JSON list"),
        (json.dumps([ROW, "text"]), "row 1 .* has no text named 'prompt': text"),
        (json.dumps([ROW, {"prompt": "p", "output": "a"}]), "row 1 .* has no text named 'answer'"),
        (json.dumps([ROW, ROW, {"prompt": "p", "answer": " "}]), "row 2 .* has no text named 'answer'"),
        (json.dumps([{"prompt": None, "answer": "a"}]), "row 0 .* has no text named 'prompt'"),
        (
            json.dumps([ROW, {"prompt": "p", "answer": "a \ud83d"}]),
            r"cannot be read as JSON: .*'\\ud83d' in position .* surrogates",
        ),
    ],
)
def test_rows_that_cannot_be_learned_are_named(tmp_path, content, complaint):
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(HFTError, match=complaint):
        read_rows(tmp_path / "train.json")


@pytest.mark.parametrize(
    ("own", "complaint"),
    [
        ({"tasks": []}, "no list of tasks"),
        ({"task": []}, "has the key 'task': the only one is tasks"),
        ({"env": {"A": "b"}, "tasks": ["x"]}, "has the key 'env'"),
        (
            {"tasks": [{"name": "mine", "metric": ["rouge_l"], "epochs": 1}]},
            r"metric \['rouge_l'\]: it must be one of",
        ),
        ({"tasks": ["mine"]}, "task 1 .* is 'mine': give it a name"),
        ({"tasks": [{"name": "a/b", "metric": "accuracy", "epochs": 1}]}, "no slash"),
        ({"tasks": [{"name": "mine", "metric": "bleu", "epochs": 1}]}, "metric 'bleu': it must be one of accuracy"),
        ({"tasks": [{"name": "mine", "metric": "accuracy"}]}, "epochs 0"),
        ({"tasks": [{"name": "mine", "metric": "accuracy", "epochs": True}]}, "epochs True"),
        ({"tasks": [{"name": "mine", "metric": "accuracy", "epoch": 1}]}, "has the key 'epoch'"),
        (
            {"tasks": [{"name": "mine", "metric": "accuracy", "epochs": 1}]},
            "mine/train.json' cannot be read as JSON: No such file",
        ),
        ({"tasks": [{"name": "m", "files": ["a"], "metric": "accuracy", "epochs": 1}]}, r"files \['a'\]"),
        (
            {"tasks": [{"name": "m", "files": {"train": "a", "test": None}, "metric": "accuracy", "epochs": 1}]},
            "files",
        ),
    ],
)
def test_mistakes_in_a_users_yaml_are_named(tmp_path, own, complaint):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(HFTError, match=complaint):
        read_tasks(tmp_path / "own.yaml")


def test_two_tasks_of_one_name_are_refused(benchmark):
    words = ["--benchmark", str(benchmark), "--output_dir", str(benchmark / "run")]
    assert len(parse_continual(words, demo.CONTINUAL_RECIPE).tasks()[0]) == len(TRACE)
    (benchmark / "more.yaml").write_text("tasks: [{name: FOMC}]")
    with pytest.raises(HFTError, match="two tasks have the name 'FOMC'"):
        parse_continual([*words, "--tasks", str(benchmark / "more.yaml")], demo.CONTINUAL_RECIPE).tasks()
