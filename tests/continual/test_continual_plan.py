"""
A folder belongs to one approach and one list of tasks, and what a run learns from is never changed by another run.
"""

import json
from pathlib import Path

import pytest

from hft_trl import demo
from hft_trl.continual.continual_recipe import parse_continual, prepare_rounds
from hft_trl.continual.run_folder import check_plan, rows_file, write_plan
from hft_trl.continual.tasks import Row, Task
from hft_trl.errors import HFTError


def plan(approach="sequential", tasks=("A", "B")):
    return {"approach": approach, "tasks": list(tasks)}


def test_a_folder_is_kept_to_its_approach_and_its_tasks_but_tasks_may_be_added(tmp_path):
    check_plan(tmp_path, plan())
    write_plan(tmp_path, plan(), [])
    check_plan(tmp_path, plan())
    check_plan(tmp_path, plan(tasks=("A", "B", "C")))
    with pytest.raises(HFTError, match="made with the approach sequential, now it is replay"):
        check_plan(tmp_path, plan("replay"))
    for tasks in (("A",), ("B", "A"), ("A", "C", "B")):
        with pytest.raises(HFTError, match=f"made with the tasks A, B, now it is {', '.join(tasks)}: choose another"):
            check_plan(tmp_path, plan(tasks=tasks))
    for damaged in ("{", "{}", "[]", '{"approach": "sequential", "tasks": null}'):
        (tmp_path / "plan.json").write_text(damaged)
        with pytest.raises(HFTError, match="cannot be read"):
            check_plan(tmp_path, plan())


TASKS = tuple(Task(name, (Row("p ", f"{name} 2024-01-01"),) * 4, (Row("p", "a"),), "accuracy", 1) for name in "AB")


def stages(folder, approach):
    words = ["--approach", approach, "--output_dir", str(folder)]
    recipe = parse_continual(words, default_config=demo.CONTINUAL_RECIPE)
    return recipe.rounds(TASKS)


def test_a_run_with_other_rows_leaves_those_of_the_first_alone(tmp_path):
    """
    It is refused when it finds the folder locked, or made with other settings, and its rows were written by then.
    """
    first = stages(tmp_path, "sequential")
    before = {stage.data.dataset: Path(stage.data.dataset).read_bytes() for stage in first}
    second = stages(tmp_path, "replay")
    assert first[0].data == second[0].data
    assert first[1].data != second[1].data
    assert before == {path: Path(path).read_bytes() for path in before}
    assert len(json.loads(Path(second[1].data.dataset).read_text())) == 5


def test_overwrite_removes_what_a_run_has_written_and_nothing_of_the_user(tmp_path):
    rounds = stages(tmp_path, "replay")
    written = [tmp_path / "scores.json", *(Path(stage.data.dataset) for stage in rounds)]
    (tmp_path / "scores.json").write_text("{}")
    (tmp_path / "round-1" / "predictions").mkdir(parents=True)
    (tmp_path / "round-1" / "stage.json").write_text("{}")
    mine = [tmp_path / name for name in ("round-notes.txt", "round-1-scores.json", "round-9/mine.txt")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    write_plan(tmp_path, plan(), [], overwrite=True)
    assert not any(path.exists() for path in [*written, tmp_path / "round-1"])
    assert [path.read_text() for path in mine] == ["mine"] * 3


def test_the_rows_of_a_round_are_named_by_what_they_are(tmp_path):
    rows = [{"prompt": "p", "answer": "a"}]
    assert rows_file(tmp_path, "round-1", rows) == rows_file(tmp_path, "round-1", [dict(row) for row in rows])
    assert rows_file(tmp_path, "round-1", rows) != rows_file(tmp_path, "round-1", [*rows, *rows])
    assert rows_file(tmp_path, "round-1", rows) != rows_file(tmp_path, "round-1", rows, "-memory")


def test_models_of_their_own_have_halves_of_their_own(tmp_path):
    seeds = [stage.hft.seed for stage in stages(tmp_path, "individual")]
    assert len(set(seeds)) == len(seeds)
    assert len({stage.hft.seed for stage in stages(tmp_path, "sequential")}) == 1  # each relates to the last one's


def test_what_a_trainer_writes_into_a_round_s_settings_stays_in_that_round(tmp_path):
    """
    transformers puts `num_steps` into `gradient_accumulation_kwargs`, and refuses a second trainer that finds it
    there.
    """
    path = tmp_path / "recipe.yaml"
    synced = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}
    path.write_text(json.dumps({"model": "demo", "output_dir": str(tmp_path), "benchmark": "demo", "sft": synced}))
    recipe = parse_continual(["--config", str(path)])
    first, second = (recipe.arguments(tmp_path / name, 1).accelerator_config for name in "AB")
    first.gradient_accumulation_kwargs["num_steps"] = 1
    assert second.gradient_accumulation_kwargs == {"sync_each_batch": True}


def test_a_later_task_that_fills_no_batch_is_found_before_the_first_is_trained(tmp_path):
    few = [{"prompt": "p", "answer": "a"}]
    for name, rows in (("first", few * 20), ("second", few * 3)):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.json").write_text(json.dumps(rows))
    tasks = [{"name": name, "metric": "accuracy", "epochs": 1} for name in ("first", "second")]
    (tmp_path / "tasks.yaml").write_text(json.dumps({"tasks": tasks}))
    words = ["--tasks", str(tmp_path / "tasks.yaml"), "--output_dir", str(tmp_path / "run")]
    recipe = parse_continual([*words, "--sft.dataloader_drop_last", "true"], default_config=demo.CONTINUAL_RECIPE)
    with pytest.raises(HFTError, match=r"^round-2: dataloader_drop_last is true, and the 3 rows"):
        prepare_rounds(recipe)
