"""The embedded mini benchmark is in TRACE's layout, and asks about nothing that it taught."""

import json
import subprocess
import sys

from warm import ROOT

from hft_trl import demo
from hft_trl.continual.tasks import read_benchmark, read_replay, read_rows

sys.path.insert(0, str(ROOT / "benchmarks"))

from demo_world import make_world

WORLD = make_world()
ROWS = {"train": 192, "test": 64}
TASKS = ("Towns", "Kinds", "Profiles", "Lists", "Ends", "Trades", "Pets", "Summaries")


def test_it_has_traces_layout_and_mix_of_metrics():
    tasks = read_benchmark(demo.TASKS)
    assert [task.name for task in tasks] == list(TASKS)
    assert [task.metric.replace("choice_", "") for task in tasks] == [
        "accuracy", "accuracy", "rouge_l", "edit_similarity", "accuracy", "accuracy", "accuracy", "rouge_l"
    ]  # fmt: skip
    for task in tasks:
        for split, rows in ROWS.items():
            content = json.loads((demo.TASKS / task.name / f"{split}.json").read_text())
            assert len(content) == rows if split != "test" else rows / 2 <= len(content) <= rows
            assert all(row.keys() == {"prompt", "answer"} for row in content)
    assert len(read_replay(demo.TASKS)) > 20


def test_the_script_rebuilds_the_shipped_files(tmp_path):
    """With another hash seed too, as everything in it depends on its seed alone."""
    code = "import runpy, sys; runpy.run_path('benchmarks/demo_tasks.py')['write_benchmark'](sys.argv[1])"
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join([str(ROOT), *sys.path])}
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, env=environment, check=True)
    made, shipped = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in (tmp_path, demo.TASKS)
    )
    assert made == shipped


def test_no_test_row_was_taught_and_no_person_of_the_probes_is_mentioned():
    rows = {split: [row for name in TASKS for row in read_rows(demo.TASKS / name / f"{split}.json")] for split in ROWS}
    taught = {row.prompt for row in (*rows["train"], *read_replay(demo.TASKS))}
    assert not {row.prompt for row in rows["test"]} & taught
    assert len(set(rows["test"])) == len(rows["test"])
    everything = "".join(prompt + answer for split in rows.values() for prompt, answer in split)
    everything += "".join(prompt + answer for prompt, answer in read_replay(demo.TASKS))
    assert not [person.name for person in WORLD.people if not person.mentioned and person.name in everything]


def test_a_prompt_has_one_right_answer():
    """Else the best score would be below 100."""
    answers = {}
    for name in TASKS:
        for row in read_rows(demo.TASKS / name / "test.json"):
            assert answers.setdefault(row.prompt, row.answer) == row.answer
