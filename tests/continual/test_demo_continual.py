"""The embedded mini benchmark is made from its seed, in TRACE's layout, and asks about nothing that it taught."""

import json
import subprocess
import sys

from hft_trl.continual.demo_tasks import ROWS, TASKS, write_benchmark
from hft_trl.continual.tasks import read_benchmark, read_replay, read_rows
from hft_trl.demo.world import make_world

WORLD = make_world()


def test_it_has_traces_layout_and_mix_of_metrics(tmp_path):
    write_benchmark(tmp_path)
    tasks = read_benchmark(tmp_path)
    assert [task.name for task in tasks] == list(TASKS)
    assert [task.metric.replace("choice_", "") for task in tasks] == [
        "accuracy", "accuracy", "rouge_l", "edit_similarity", "accuracy", "accuracy", "accuracy", "rouge_l"
    ]  # fmt: skip
    for task in tasks:
        for split, rows in ROWS.items():
            content = json.loads((tmp_path / task.name / f"{split}.json").read_text())
            assert len(content) == rows if split != "test" else rows / 2 <= len(content) <= rows
            assert all(row.keys() == {"prompt", "answer"} for row in content)
    assert len(read_replay(tmp_path)) > 20


def test_the_files_depend_on_the_seed_alone(tmp_path):
    code = "import sys; from hft_trl.continual.demo_tasks import write_benchmark; write_benchmark(sys.argv[1], 5)"
    made = []
    for hash_seed in ("0", "1"):
        folder = tmp_path / hash_seed
        subprocess.run(
            [sys.executable, "-c", code, folder],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            check=True,
        )
        made.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert made[0] == made[1]
    write_benchmark(tmp_path / "other", 6)
    assert (tmp_path / "other" / "Towns" / "train.json").read_bytes() not in made[0].values()


def test_no_test_row_was_taught_and_no_person_of_the_probes_is_mentioned(tmp_path):
    write_benchmark(tmp_path)
    rows = {split: [row for name in TASKS for row in read_rows(tmp_path / name / f"{split}.json")] for split in ROWS}
    taught = {row.prompt for row in (*rows["train"], *read_replay(tmp_path))}
    assert not {row.prompt for row in rows["test"]} & taught
    assert len(set(rows["test"])) == len(rows["test"])
    everything = "".join(prompt + answer for split in rows.values() for prompt, answer in split)
    everything += "".join(prompt + answer for prompt, answer in read_replay(tmp_path))
    assert not [person.name for person in WORLD.people if not person.mentioned and person.name in everything]


def test_a_prompt_has_one_right_answer(tmp_path):
    """Else the best score would be below 100."""
    write_benchmark(tmp_path)
    answers = {}
    for name in TASKS:
        for row in read_rows(tmp_path / name / "test.json"):
            assert answers.setdefault(row.prompt, row.answer) == row.answer
