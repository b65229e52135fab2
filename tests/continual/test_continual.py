"""Continual learning as a user runs it: rounds on files in TRACE's layout, to scores that a kill doesn't change."""

import dataclasses
import gc
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from conftest import started_from, tiny_llama, write_rows
from safetensors.torch import load_file
from warm import ROOT, Run

from hft_trl import HFTSFTTrainer, Selection, demo
from hft_trl.continual.continual_recipe import parse_continual
from hft_trl.continual.rounds import evaluate_tasks
from hft_trl.continual.tasks import TRACE, Row, Task, read_benchmark, read_rows, rouge_l
from hft_trl.errors import HFTError
from hft_trl.retention.meter import BASE_FILE

TASKS = """
tasks:
  - {name: Towns, metric: accuracy, epochs: 2}
  - {name: Lists, metric: edit_similarity, epochs: 1}
  - {name: Profiles, metric: rouge_l, epochs: 1}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A model and three small tasks."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(demo.MODEL, folder / "model")  # under another name it isn't asked the demo's questions
    for name in ("Towns", "Lists", "Profiles", "Lima"):
        for path in (demo.TASKS / name).glob("t*.json"):
            rows = [Row(**row) for row in json.loads(path.read_text())[:16]]
            write_rows(folder / "tasks" / name / path.name, rows)
    (folder / "tasks" / "tasks.yaml").write_text(TASKS)
    kept = [{"text": "Mara Stone lives in a town.", "prompt": "Where does Mara Stone live?"}] * 2
    (folder / "kept.jsonl").write_text("\n".join(map(json.dumps, kept)))
    return folder


def flags(own, output, *more):
    return [
        *started_from(own / "model", demo.CONTINUAL_RECIPE), "--benchmark", own / "tasks", "--output_dir", output, "--sft.save_steps", 1,
        "--sft.per_device_train_batch_size", 8, "--max_new_tokens", 8, "--sft.disable_tqdm", "true",
        "--retention.texts", own / "kept.jsonl", "--retention.prompts", own / "kept.jsonl", *more,
    ]  # fmt: skip


@pytest.fixture
def recipe(monkeypatch, capsys):
    """Runs the recipe inside the test's process, where the libraries are loaded already."""

    def run_inside(*words) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["recipes/continual.py", *map(str, words)])
        monkeypatch.chdir(ROOT)
        code = 0
        try:
            runpy.run_path("recipes/continual.py", run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    return run_inside


@pytest.fixture(scope="module")
def finished_run(own, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "c"
    run = Run(output.with_name("log"), "continual", *flags(own, output))
    return output, run.finish()


def test_a_run_leaves_scores_predictions_and_a_model_for_every_round(finished_run, own):
    output, said = finished_run
    scores = json.loads((output / "scores.json").read_text())
    assert scores["tasks"] == ["Towns", "Lists", "Profiles"]
    assert [len(row) for row in scores["matrix"]] == [1, 2, 3]
    assert all(0 <= score <= 100 for row in scores["matrix"] for score in row)
    assert [len(scores[key]) for key in ("op", "bwt", "bwt_t_minus_1")] == [3, 3, 3]
    assert scores["op"][-1] == pytest.approx(sum(scores["matrix"][-1]) / 3)
    assert [planned["steps"] for planned in scores["rounds"]] == [4, 2, 2]
    assert [planned["truncated_rows"] for planned in scores["rounds"]] == [0, 0, 0]
    assert scores["method"] == "hft"
    for number, planned in enumerate(scores["rounds"]):
        folder = output / planned["name"]
        assert planned["selection_digest"] == Selection.load(folder).digest
        assert sorted(path.stem for path in (folder / "predictions").iterdir()) == sorted(
            scores["tasks"][: number + 1]
        )
        for name in scores["tasks"][: number + 1]:
            content = json.loads((folder / "predictions" / f"{name}.json").read_text())
            test = json.loads((own / "tasks" / name / "test.json").read_text())
            assert [row["answer"] for row in content["predictions"]] == [row["answer"] for row in test]
    assert len({planned["selection_digest"] for planned in scores["rounds"]}) == 3
    assert "OP" in said


def test_in_each_round_the_frozen_half_is_the_last_rounds_byte_for_byte(finished_run, own):
    output, _ = finished_run
    chain = [own / "model", *(output / f"round-{number}" for number in (1, 2, 3))]
    for start, end in pairwise(chain):
        before, after = load_file(start / "model.safetensors"), load_file(end / "model.safetensors")
        selection = Selection.load(end)
        assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in selection.frozen)
        assert any(before[name].numpy().tobytes() != after[name].numpy().tobytes() for name in selection.trainable)


def test_every_round_is_measured_against_the_runs_base_and_not_its_own_start(finished_run):
    output, _ = finished_run
    kept = json.loads((output / "scores.json").read_text())["retention"]
    assert list(kept) == ["base", "round-1", "round-2", "round-3"]
    assert [path.parent.name for path in output.rglob(BASE_FILE)] == ["round-1"]
    starts = []
    for number in (1, 2, 3):
        record = json.loads((output / f"round-{number}" / "stage.json").read_text())["record"]
        (start, *_, end) = [row for row in record["history"] if "retention/base_kl" in row]
        starts.append(start["retention/base_kl"])
        assert end["retention/base_kl"] == kept[f"round-{number}"]["base_kl"] > 0
    assert starts == [0, kept["round-1"]["base_kl"], kept["round-2"]["base_kl"]]
    assert "| round-3 |" in (output / "report.md").read_text().split("## Retention")[1]


def left(output: Path) -> dict[str, bytes]:
    """What has to be the same however often a run was ended: weights, selections, scores and predictions."""
    wanted = ("model.safetensors", "hft_selection.json", "scores.json")
    paths = [path for path in output.rglob("*") if path.name in wanted or path.parent.name == "predictions"]
    paths = [path for path in paths if "checkpoint-" not in str(path)]
    here = str(output).encode()  # a selection names its start model by the path
    return {str(path.relative_to(output)): path.read_bytes().replace(here, b"") for path in paths}


def test_the_same_command_again_trains_and_generates_nothing(recipe, finished_run, own):
    output, _ = finished_run
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.suffix in (".safetensors", ".json")}
    result = recipe(*flags(own, output))
    assert result.returncode == 0, result.stderr[-3000:]
    after = {path: path.stat().st_mtime_ns for path in before}
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed <= {"scores.json"}


@pytest.mark.parametrize("where", ["*/round-2/checkpoint-2/hft_checkpoint.json", "*/round-2/predictions/.Lists.json"])
def test_a_killed_run_ends_in_the_same_bytes(where, finished_run, own, tmp_path):
    """Killed in the middle of a round's training, and between the answers to two test sets."""
    import faults

    output = tmp_path / "c"
    event = "os.rename" if "checkpoint" in where else "open"
    run = Run(tmp_path / "log", "continual", *flags(own, output), before=faults.at_write, given=(event, where))
    assert run.wait() == [-signal.SIGKILL], run.output()[-3000:]
    Run(tmp_path / "again", "continual", *flags(own, output)).finish()
    assert left(output) == left(finished_run[0])


def test_a_second_run_in_the_same_folder_is_refused_before_it_changes_anything(own, tmp_path):
    """Also one of other tasks, whose rounds have other folders, and one that overwrites."""
    output = tmp_path / "run"
    # Without measurements, as these write a file
    long = ["--sft.max_steps", 100000, "--sft.save_steps", 100000, "--retention.max_rows", 0]
    first = Run(tmp_path / "log", "continual", *flags(own, output, *long))
    try:
        while not (output / "plan.json").exists():
            assert first.wait(0.05) is None
        before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        other = [*started_from(own / "model", demo.CONTINUAL_RECIPE), "--benchmark", "demo", "--output_dir", output]
        in_use = f"in use by process {first.processes[0].pid} on "
        commands = (
            (flags(own, output, *long, "--overwrite"), in_use),
            ([*other, "--overwrite"], in_use),
            (other, "was made with the tasks Towns, Lists, Profiles, now it is Towns, Kinds, "),
        )
        for number, (words, complaint) in enumerate(commands):
            second = Run(tmp_path / f"log{number}", "continual", *words)
            assert second.wait() == [2]
            errors = [line for line in second.output().splitlines() if line.startswith("error: ")]
            assert len(errors) == 1
            assert complaint in errors[0]
        assert first.wait(0.05) is None
        assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    finally:
        first.send(signal.SIGKILL)
        first.wait()


def test_another_approach_in_the_same_folder_is_refused(recipe, finished_run, own):
    result = recipe(*flags(own, finished_run[0], "--approach", "replay"))
    assert result.returncode == 2
    assert "error: output_dir" in result.stderr
    assert "made with the approach sequential, now it is replay" in result.stderr


def test_two_processes_share_training_and_answering(own, tmp_path):
    """With full fine-tuning and replay, so that these run too."""
    output = tmp_path / "c2"
    words = flags(own, output, "--approach", "replay", "--method", "fft", "--sft.max_steps", 2)
    Run(tmp_path / "log", "continual", *words, "--sft.per_device_train_batch_size", 4, processes=2).finish()
    scores = json.loads((output / "scores.json").read_text())
    assert [len(row) for row in scores["matrix"]] == [1, 2, 3]
    assert scores["method"] == "fft"
    (mixed,) = (json.loads(path.read_text()) for path in output.glob("round-3-*.json"))
    assert len(mixed) == 16 + 2 + 2 + 16  # the task, 10 % of two earlier ones, Lima
    content = json.loads((output / "round-3" / "predictions" / "Lists.json").read_text())
    shutil.copytree(output / "round-3", tmp_path / "alone", ignore=shutil.ignore_patterns("predictions"))
    task = next(task for task in read_benchmark(own / "tasks") if task.name == "Lists")
    evaluate_tasks(tmp_path / "alone", [task], 8, 128, 64)
    assert json.loads((tmp_path / "alone" / "predictions" / "Lists.json").read_text()) == content


def test_one_model_per_task_then_pooled_tasks_in_the_same_folder(recipe, own, tmp_path):
    """
    The same shape of scores; with --overwrite nothing of the first run is left.

    The chat template tells no answers apart.
    """
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    words = ["--sft.max_steps", 1, "--model.chat_template", tmp_path / "plain.jinja"]
    output = tmp_path / "c"
    result = recipe(*flags(own, output, "--approach", "individual", *words))
    assert result.returncode == 0, result.stderr[-3000:]
    scores = json.loads((output / "scores.json").read_text())
    assert [len(row) for row in scores["matrix"]] == [1, 2, 3]
    for task in range(3):  # a model of its own is asked once
        assert len({row[task] for row in scores["matrix"] if len(row) > task}) == 1
    assert len({planned["selection_digest"] for planned in scores["rounds"]}) == 3
    shutil.rmtree(output / "round-1")
    assert recipe(*flags(own, output, "--approach", "individual", *words)).returncode == 0  # no other needs it
    refused = recipe(*flags(own, output, "--approach", "multitask", *words))
    assert "made with the approach individual, now it is multitask" in refused.stderr
    result = recipe(*flags(own, output, "--approach", "multitask", *words, "--overwrite"))
    assert result.returncode == 0, result.stderr[-3000:]
    scores = json.loads((output / "scores.json").read_text())
    assert [len(row) for row in scores["matrix"]] == [3]
    assert [path.name for path in output.glob("round-*/")] == ["round-1"]
    assert len(list(output.glob("round-*.json"))) == 1


def test_tasks_added_later_are_learned_after_the_others(recipe, own, tmp_path):
    """And no trainer is left in memory when a round's model answers."""
    held = []

    def evaluating(*args, **kwargs):
        held.append([kind for kind in map(type, gc.get_objects()) if issubclass(kind, HFTSFTTrainer)])
        return evaluate_tasks(*args, **kwargs)

    tasks = yaml.safe_load(TASKS)["tasks"]
    output, model = tmp_path / "c", ["--model", own / "model", "--tasks", own / "tasks" / "first.yaml"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hft_trl.continual.rounds.evaluate_tasks", evaluating)
        for count in (1, 2):
            (own / "tasks" / "first.yaml").write_text(yaml.safe_dump({"tasks": tasks[:count]}))
            (tmp_path / "own.yaml").write_text("sft: {max_steps: 1, max_length: 64, report_to: none}\n")
            words = ["--config", tmp_path / "own.yaml", *model, "--output_dir", output, "--max_new_tokens", 4]
            result = recipe(*words)
            assert result.returncode == 0, result.stderr[-3000:]
    assert [len(row) for row in json.loads((output / "scores.json").read_text())["matrix"]] == [1, 2]
    assert held == [[], [], []]
    (own / "tasks" / "first.yaml").write_text(yaml.safe_dump({"tasks": tasks[1:]}))
    refused = recipe(*words)
    assert refused.returncode == 2
    assert "made with the tasks Towns, Lists, now it is Lists, Profiles" in refused.stderr


def test_whole_layers_take_turns(recipe, own, tmp_path):
    """Strategy layer: the next round learns the layers that the last one did not, as in the paper."""
    result = recipe(*flags(own, tmp_path / "c", "--hft.strategy", "layer", "--sft.max_steps", 1))
    assert result.returncode == 0, result.stderr[-3000:]
    learned = []
    for number in (1, 2, 3):
        names = Selection.load(tmp_path / "c" / f"round-{number}").trainable
        learned.append({name.split(".")[2] for name in names if ".layers." in name})
    assert learned[0] == learned[2]
    assert learned[0] & learned[1] == set()
    assert len(learned[0] | learned[1]) == 8


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--benchmark", "nowhere"], "nowhere' is no folder"),
        (["--approach", "sequentially"], "approach: invalid choice"),
        (["--tasks", "nowhere.yaml"], "nowhere.yaml' cannot be read"),
        (["--replay_share", "1.5"], "replay_share is 1.5"),
        (["--max_new_tokens", "128"], "max_new_tokens is 128 and sft.max_length 128"),
        (
            ["--max_new_tokens", "9999", "--sft.max_length", "99999"],
            "max_new_tokens is 9999 and the model's positions are",
        ),
        (["--sft.assistant_only_loss", "true"], "sft.assistant_only_loss is true"),
        (["--sft.packing", "true"], "sft.packing is true"),
        (["--sft.eval_strategy", "epoch"], "sft.eval_strategy is set"),
        (["--hft.method", "fft"], "unknown key hft.method"),
        (["--dpo.beta", "1"], "unknown key dpo.beta: --help lists the keys."),
        (["--benchmrk", "x"], "did you mean benchmark"),
        (["--ratio", "0.3"], "unknown key ratio: did you mean hft.ratio?"),
        (["--lora.learning_rate", "1"], "unknown key lora.learning_rate: did you mean sft.learning_rate?"),
        (["--config", "recipes/configs/qwen3-4b.yaml"], "has the sections dpo, which this recipe does not have"),
        (["--model", "Qwen/Qwen3-0.6B", "--evaluate", "x"], "model is 'Qwen/Qwen3-0.6B', but without --config"),
        (["--eval_batch_size", "-4"], "eval_batch_size is -4: it must be at least 1"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0: it must be at least 1"),
        (["--benchmark", "none"], "there is no task"),
        (["--approach", "individual", "--evaluate", "demo"], "evaluate is 'demo', but individual leaves no model"),
    ],
)
def test_mistakes_are_said_in_one_line_before_anything_is_trained(words, complaint, recipe, tmp_path):
    result = recipe("--output_dir", tmp_path / "c", *words)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert complaint in line
    assert not list((tmp_path / "c").glob("round-*/")) if (tmp_path / "c").exists() else True


def test_without_any_task_a_config_is_refused(tmp_path):
    (tmp_path / "own.yaml").write_text("model: demo\noutput_dir: runs/x\n")
    with pytest.raises(HFTError, match="there is no task"):
        parse_continual(["--config", str(tmp_path / "own.yaml")])


def test_tasks_of_ones_own_are_the_only_ones_where_nothing_else_is_asked_for(tmp_path):
    """The default file's benchmark is for those who name no task; that of a file which is named can be left out."""

    def asked(*words):
        run = parse_continual([*words], default_config=demo.CONTINUAL_RECIPE).run
        return run.benchmark, run.tasks

    own = ["--tasks", "mine.yaml"]
    config = ["--config", str(demo.CONTINUAL_RECIPE)]
    assert asked() == ("demo", None)
    assert asked(*own) == (None, "mine.yaml")
    assert asked(*own, "--benchmark", "demo") == asked(*own, *config) == ("demo", "mine.yaml")
    assert asked(*own, *config, "--benchmark=none") == (None, "mine.yaml")
    for word in ("null", "none"):
        (tmp_path / "own.yaml").write_text(f"{{model: demo, output_dir: o, benchmark: {word}, max_new_tokens: 8}}")
        assert asked(*own, "--config", str(tmp_path / "own.yaml")) == (None, "mine.yaml")


def test_a_rounds_length_is_the_tasks_epochs_unless_the_user_says_otherwise():
    recipe = parse_continual([], default_config=demo.CONTINUAL_RECIPE)
    assert recipe.arguments("c", 7).num_train_epochs == 7
    assert recipe.arguments("c", 7).lr_scheduler_type == "constant"
    for words in (["--sft.num_train_epochs", "1"], ["--sft.num-train-epochs=1"]):
        assert parse_continual(words, default_config=demo.CONTINUAL_RECIPE).arguments("c", 7).num_train_epochs == 1


def test_the_users_epochs_replace_those_of_the_tasks_in_multitask_too(tmp_path):
    """They would multiply them, and scores.json would state only the user's."""
    for number, (words, repeated) in enumerate((([], 4), (["--sft.num_train_epochs", "3"], 1))):
        words = [*words, "--approach", "multitask", "--output_dir", str(tmp_path / str(number))]
        recipe = parse_continual(words, default_config=demo.CONTINUAL_RECIPE)
        tasks, _ = recipe.tasks()
        (only,) = recipe.rounds(tasks)
        passes = len(only.plan.rows) * only.args.num_train_epochs / sum(len(task.train) for task in tasks)
        assert len(only.plan.rows) == repeated * sum(len(task.train) for task in tasks)
        assert recipe.plan(tasks)["settings"]["epochs"] == [passes] * len(tasks)


def test_trace_with_a_small_model_leaves_out_a_task_that_some_copies_lack(tmp_path, monkeypatch):
    """The config and its list of tasks, which the header says to copy into TRACE's folder."""
    monkeypatch.setattr("hft_trl.demo.real_model.smollm2_path", lambda: str(demo.MODEL))  # it needs packages
    config = ROOT / "recipes/configs/trace-smollm2.yaml"
    header = config.read_text().split("\nmodel:")[0]
    assert all(word in header for word in ("Machine:", "Memory:", "Needs:", "Launch:"))
    (listed,) = re.findall(r"cp (\S+) \S+/tasks.yaml", header)
    (tmp_path / "tasks.yaml").write_text((ROOT / listed).read_text())
    kept = [name for name in TRACE if name != "MeetingBank"]
    for name in kept:
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.json").write_text(json.dumps([{"prompt": "q", "answer": "a"}]))
    recipe = parse_continual(["--config", str(config), "--sft.use_cpu", "true", "--benchmark", str(tmp_path)])
    tasks, _ = recipe.tasks()
    assert {task.name: (task.metric, task.epochs) for task in tasks} == {name: TRACE[name] for name in kept}
    stated, sft = yaml.safe_load(config.read_text())["sft"], recipe.arguments("c", 5)
    for key, value in stated.items():
        found = getattr(sft, key)
        assert found == value or str(getattr(found, "value", found)) == str(value), key


def test_the_papers_hyper_parameters():
    """Paper: Llama 2 7B chat, constant 1e-5, batch 128 on 8 GPUs, a fresh half in every round."""
    config = ROOT / "recipes/configs/trace-llama2-7b-chat.yaml"
    recipe = parse_continual(["--config", str(config), "--sft.use_cpu", "true"])
    sft = recipe.arguments("c", 5)
    assert (sft.learning_rate, sft.lr_scheduler_type, recipe.hft.reselect, recipe.hft.ratio) == (
        1e-5,
        "constant",
        "fresh",
        0.5,
    )
    assert sft.per_device_train_batch_size * sft.gradient_accumulation_steps * 8 == 128
    assert recipe.run.replay_share == 0.1
    assert sft.num_train_epochs == 5
    header = config.read_text().split("\nmodel:")[0]
    assert all(word in header for word in ("Machine:", "Memory:", "Needs:", "Launch:"))
    assert recipe.auto_checkpointing
    for key, value in yaml.safe_load(config.read_text())["sft"].items():
        if key == "activation_checkpointing":  # a key of recipes, whose value is chosen on the machine
            continue
        found = getattr(sft, key)
        assert found == value or str(getattr(found, "value", found)) == str(value), key


def test_empty_predictions_and_cut_prompts_are_counted_and_score_nothing(tokenizer, tmp_path):
    """A model that ends at once: every token ends a turn."""
    model = tiny_llama(len(tokenizer))
    model.lm_head.weight.data.zero_()
    model.generation_config.eos_token_id = list(range(len(tokenizer)))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task = Task("T", (), (Row("Ada", "Rome."), Row("Where does Ada live? " * 9, "Rome.")), "edit_similarity", 1)
    found = evaluate_tasks(tmp_path, [task], max_new_tokens=4, max_length=16, batch_size=2)
    assert found["T"].score == 0
    assert found["T"].empty == 2
    assert found["T"].truncated == 1
    assert evaluate_tasks(tmp_path, [task], max_new_tokens=4, max_length=16, batch_size=2) == found


def test_rows_longer_than_the_model_are_cut_too(tokenizer, tmp_path):
    """Without a max_length, what the model has no positions for would be found after hours of training."""
    tiny_llama(len(tokenizer), max_position_embeddings=24).save_pretrained(tmp_path / "model")
    words = [*started_from(tmp_path / "model", demo.CONTINUAL_RECIPE), "--output_dir", tmp_path / "c"]
    words += ["--benchmark", "demo", "--max_new_tokens", 4]
    recipe = parse_continual([str(word) for word in words])
    assert {stage.max_length for stage in recipe.rounds(*recipe.tasks())} == {24}


def test_a_changed_metric_scores_the_predictions_that_are_there(tokenizer, tmp_path, monkeypatch):
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task = Task("T", (), (Row("Where does Ada live?\n", "Rome."),), "edit_similarity", 1)
    first = evaluate_tasks(tmp_path, [task], 4, None, 2)["T"].score
    (tmp_path / "model.safetensors").unlink()  # nothing is generated anew
    content = json.loads((tmp_path / "predictions" / "T.json").read_text())
    (row,) = content["predictions"]
    assert evaluate_tasks(tmp_path, [dataclasses.replace(task, metric="rouge_l")], 4, None, 2)["T"].score == rouge_l(
        row["prediction"], "Rome."
    )
    assert json.loads((tmp_path / "predictions" / "T.json").read_text())["metric"] == "rouge_l"
    assert evaluate_tasks(tmp_path, [task], 4, None, 2)["T"].score == first


def test_predictions_depend_neither_on_the_batch_nor_on_the_models_own_penalties(tmp_path):
    """In float32. Some chat models ship a repetition penalty in their generation config."""
    shutil.copytree(demo.MODEL, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"repetition_penalty": 9.0}))
    rows = read_rows(demo.TASKS / "Profiles/test.json")[:12]
    written = []
    for batch, folder in ((1, tmp_path / "model"), (5, tmp_path / "model"), (12, demo.MODEL)):
        copy = tmp_path / f"by-{batch}"
        shutil.copytree(folder, copy)
        evaluate_tasks(copy, [Task("T", (), rows, "rouge_l", 1)], 12, None, batch)
        written.append((copy / "predictions" / "T.json").read_text())
    assert written[0] == written[1] == written[2]
