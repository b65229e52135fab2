"""A stage's folder: reruns are recognised by what the weights depend on, and nothing of the user's is removed."""

import errno
import json
import shlex
import shutil
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import parse_recipe
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import save_file
from trl import SFTConfig

from hft_trl import HFTError, demo, recipe
from hft_trl.recipe import parse_stage
from hft_trl.recipe.folder import LOCK_FILE, finished, lock, mark_finished, mark_started, open_stages, place, settings
from hft_trl.report import StageRecord


def stage(folder, flags=""):
    return parse_recipe(["--output_dir", str(folder), *shlex.split(flags)], default_config=demo.RECIPE).stages["sft"]


RECORD = StageRecord("sft", "hft", "d" * 64, {"layers": 0.5}, 1, 2, 3, 4, 5.0, 6.0, 7, 8, 1.5, 0.5, True)


def train(folder):
    """What training leaves, as far as the folder is concerned."""
    save_file({"w": torch.ones(1)}, folder / "sft" / "model.safetensors")
    mark_finished(stage(folder), RECORD)


def test_a_folder_that_is_another_one_for_some_process_is_refused(tmp_path, monkeypatch):
    """As on two machines with a disk each: the second would find no checkpoint, and train something else."""
    monkeypatch.setattr(
        "hft_trl.recipe.folder.PartialState", lambda: SimpleNamespace(num_processes=2, is_main_process=True)
    )
    open_stages([stage(tmp_path)])
    monkeypatch.setattr("hft_trl.recipe.folder.all_see", lambda _: False)
    with pytest.raises(HFTError, match="is not the same folder for every process"):
        open_stages([stage(tmp_path)])


def test_a_folder_is_unfinished_until_it_is_marked(tmp_path):
    open_stages([stage(tmp_path)])
    assert finished(stage(tmp_path)) is None
    train(tmp_path)
    assert finished(stage(tmp_path)) == RECORD
    open_stages([stage(tmp_path)])
    assert finished(stage(tmp_path)) == RECORD


def test_a_finished_stage_whose_weights_are_gone_is_no_finished_one(tmp_path):
    open_stages([stage(tmp_path)])
    train(tmp_path)
    (tmp_path / "sft" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(HFTError, match="missing or incomplete"):
        open_stages([stage(tmp_path)])


def test_settings_without_anything_trained_with_them_are_replaced(tmp_path):
    open_stages([stage(tmp_path)])
    open_stages([stage(tmp_path, "--sft.learning_rate 0.5")])
    train(tmp_path)
    with pytest.raises(HFTError, match="was made with other settings"):
        open_stages([stage(tmp_path, "--sft.learning_rate 0.25")])


def test_a_second_sft_stage_is_named_by_its_own_section(tmp_path):
    def second(rate):
        words = ["--output_dir", str(tmp_path), "--sft2.dataset", "demo", "--sft2.learning_rate", rate]
        return recipe.parse_recipe(words, {"sft": SFTConfig, "sft2": SFTConfig}, demo.RECIPE).stages["sft2"]

    open_stages([second("1e-4")])
    (tmp_path / "sft2" / "checkpoint-1").mkdir()
    with pytest.raises(HFTError, match=r"\(sft2\.learning_rate 0\.0001 there, 0\.0003 here"):
        open_stages([second("3e-4")])


def test_a_changed_source_text_is_another_half(tmp_path):
    source = tmp_path / "source.txt"
    flags = f"--hft.strategy importance --hft.importance wanda --hft.source_texts {source}"
    source.write_text("one")
    before = settings(stage(tmp_path, flags))
    assert settings(stage(tmp_path, flags)) == before
    source.write_text("two")
    assert settings(stage(tmp_path, flags)) != before
    unread = [settings(stage(tmp_path, words)) for words in ("", "--hft.source_texts elsewhere")]
    assert unread[0] == unread[1]


def test_the_method_is_the_same_wherever_it_is_set(tmp_path):
    assert settings(stage(tmp_path, "--method fft")) == settings(stage(tmp_path, "--sft.method fft"))
    assert settings(stage(tmp_path, "--method fft")) != settings(stage(tmp_path))


def test_a_name_on_the_hub_is_itself_in_every_working_directory(tmp_path, monkeypatch):
    """Beside the output it was taken for a folder there, and the run could not be resumed from elsewhere."""
    monkeypatch.chdir(tmp_path)
    assert [place(name, Path("sft")) for name in ("imdb", "org/data")] == ["imdb", "org/data"]
    (tmp_path / "base").mkdir()
    assert [place("base", Path(folder)) for folder in ("sft", "runs/sft")] == ["../base", str(tmp_path / "base")]


def test_a_file_is_the_same_setting_wherever_it_is_named_from(tmp_path, monkeypatch):
    for name in ("a/t.jinja", "a/rows/train.jsonl", "b/t.jinja", "b/rows/train.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(working, folder):
        monkeypatch.chdir(tmp_path / working)
        config, template = tmp_path / "mix.yaml", f"{folder}t.jinja"
        config.write_text(json.dumps({"datasets": [{"path": f"{folder}rows"}]}))
        words = ["--config", str(config), "--model_name_or_path", "demo", "--output_dir", str(tmp_path / "run")]
        words += ["--chat_template", template, "--chat_template_path", template]
        return settings(parse_stage("sft", SFTConfig, words)[0])

    before = found("a", "")
    assert found("a", "./") == found("b", "../a/") == before
    other = found("b", "")  # another file of the same name
    assert {name for name in ("model", "data", "sft") if other[name] != before[name]} == {"model", "data", "sft"}


def test_model_and_data_may_move_with_the_run(tmp_path):
    """As when a project is copied to another machine. Other contents at the new place are another setting."""
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(demo.MODEL, before / "model")
    (before / "chats.jsonl").write_text("one")

    def of(project):
        return stage(
            project / "runs", f"--config {demo.RECIPE} --model {project}/model --sft.dataset {project}/chats.jsonl"
        )

    open_stages([of(before)])
    train(before / "runs")
    before.rename(after)
    open_stages([of(after)])
    assert finished(of(after)) == RECORD
    (after / "chats.jsonl").write_text("two")
    with pytest.raises(HFTError, match=r"\(the files of data have changed \(data\.content\); data\.dataset"):
        open_stages([of(after)])


def test_a_changed_data_file_is_another_setting(tmp_path):
    data = tmp_path / "chats.jsonl"
    data.write_text("one")
    open_stages([stage(tmp_path, f"--sft.dataset {data}")])
    (tmp_path / "sft" / "checkpoint-1").mkdir()
    open_stages([stage(tmp_path, f"--sft.dataset {data}")])
    data.write_text("two")
    with pytest.raises(HFTError, match=r"data\.content"):
        open_stages([stage(tmp_path, f"--sft.dataset {data}")])


@pytest.fixture
def run(tmp_path):
    """A run of both stages: opens it with some flags, and trains a stage of it as far as its folder is concerned."""

    class OfBoth:
        def __init__(self, flags=""):
            words = ["--output_dir", str(tmp_path), *shlex.split(flags)]
            recipe = parse_recipe(words, default_config=demo.RECIPE)
            self.stages = {"sft": recipe.stages["sft"], "dpo": recipe.stages["dpo"]}

        def open(self, **how):
            open_stages(self.stages.values(), **how)

        def train(self, name, weight, done=True):
            folder = self.stages[name].folder
            mark_started(self.stages[name])
            (folder / "checkpoint-1").mkdir(exist_ok=True)
            if done:
                save_file({"w": torch.full((1,), weight)}, folder / "model.safetensors")
                mark_finished(self.stages[name], RECORD)

    return OfBoth


@pytest.mark.parametrize("done", [True, False])
def test_a_stage_belongs_to_the_model_that_it_was_trained_from(run, tmp_path, done):
    """Its start model was not trained yet when both were opened. Trained again, it is another model."""
    both = run()
    both.open()
    both.train("sft", 1.0)
    both.train("dpo", 2.0, done)
    both.open()
    assert (finished(both.stages["dpo"]) is not None) is done
    save_file({"w": torch.full((1,), 3.0)}, tmp_path / "sft" / "model.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(HFTError) as error:
        both.open()
    for word in (f"the start model '{tmp_path}/sft' has other weights than", str(tmp_path / "dpo"), "--overwrite"):
        assert word in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    shutil.rmtree(tmp_path / "dpo")  # the way out that the error names
    both.open()
    assert finished(both.stages["sft"]) is not None
    assert finished(both.stages["dpo"]) is None


@pytest.mark.parametrize("done", [True, False])
def test_a_stage_does_not_go_on_from_a_model_that_is_gone(run, tmp_path, done):
    both = run()
    both.open()
    both.train("sft", 1.0)
    both.train("dpo", 2.0, done)
    shutil.rmtree(tmp_path / "sft")
    with pytest.raises(HFTError, match=r"was trained before, but '.*sft', its start, holds no finished model"):
        both.open()


def test_a_stage_that_was_killed_before_its_first_checkpoint_starts_from_what_is_there_now(run, tmp_path):
    both = run()
    both.open()
    both.train("sft", 1.0)
    mark_started(both.stages["dpo"])
    save_file({"w": torch.full((1,), 3.0)}, tmp_path / "sft" / "model.safetensors")
    both.open()
    both.train("dpo", 2.0)
    both.open()


@pytest.mark.parametrize("done", [True, False])
def test_what_is_measured_on_other_rows_is_not_shown_beside_the_figures_before(run, tmp_path, done):
    """The report shows the difference of each stage to the base, which the first session measured."""
    for folder, text in (("a", "Ada lives in Rome."), ("b", "Ada lives in Rome."), ("c", "Bo lives in Oslo.")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "texts.txt").write_text(text)
    texts, moved, others = (f"--retention.texts {tmp_path}/{folder}/texts.txt" for folder in "abc")
    first = run(texts)
    first.open()
    first.train("sft", 1.0, done)
    for same in (moved, f"{texts} --retention.every 2"):
        run(same).open()
    for other, message in (
        (others, r"the files of retention\.texts have changed"),
        ("", r"the files of retention\.texts have changed"),  # the embedded model has rows of its own
        (f"{texts} --retention.max_rows 7", r"retention\.max_rows 128 there, 7 here"),
    ):
        with pytest.raises(HFTError, match=message):
            run(other).open()
    run("--retention.max_rows 0").open()  # nothing more is measured


def test_another_tokenizer_or_template_of_the_start_model_is_named(run, tmp_path):
    both = run()
    both.open()
    both.train("sft", 1.0)
    both.train("dpo", 2.0)
    (tmp_path / "sft" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(HFTError, match="has another configuration or tokenizer than"):
        both.open()


def test_an_edited_template_is_another_setting(run, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("one")
    flags = f"--model.chat_template {template}"
    both = run(flags)
    both.open()
    both.train("sft", 1.0)
    run(flags).open()
    template.write_text("two")
    with pytest.raises(HFTError, match=r"the files of model\.chat_template have changed"):
        run(flags).open()


def test_a_changed_part_of_a_mixture_is_named(tmp_path):
    rows, config = tmp_path / "rows.jsonl", tmp_path / "mix.yaml"
    rows.write_text("one")

    def open_mixture(columns):
        part = {"path": "json", "data_files": str(rows), "columns": columns}
        config.write_text(json.dumps({"datasets": [part, {"path": "org/other"}]}))
        words = ["--config", str(config), "--model_name_or_path", "demo", "--output_dir", str(tmp_path / "run")]
        stage, _ = parse_stage("sft", SFTConfig, words)
        open_stages([stage])
        return stage

    mark_started(open_mixture(["messages"]))
    (tmp_path / "run" / "checkpoint-1").mkdir()
    open_mixture(["messages"])
    with pytest.raises(HFTError, match=r"data\.mixture\.datasets\.0\.columns \['messages'\] there, \['text'\] here"):
        open_mixture(["text"])
    rows.write_text("two")
    with pytest.raises(HFTError, match=r"the files of data\.mixture\.datasets\.0 have changed"):
        open_mixture(["messages"])


def test_nothing_is_removed_unless_every_folder_of_the_run_can_be_had(run, tmp_path):
    both = run()
    both.open()
    both.train("sft", 1.0)
    (tmp_path / "dpo" / "stage.json").unlink()
    (tmp_path / "dpo" / "thesis.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(HFTError, match="contains other files"):
        both.open(overwrite=True)
    (tmp_path / "dpo" / "thesis.txt").unlink()
    (tmp_path / "dpo" / LOCK_FILE).unlink()  # this process's own
    fork = get_context("fork")
    locked = fork.Event()

    def hold():
        lock(tmp_path / "dpo")
        locked.set()
        time.sleep(600)

    other = fork.Process(target=hold)
    other.start()
    assert locked.wait(60)
    with pytest.raises(HFTError, match=f"in use by process {other.pid}"):
        both.open(overwrite=True)
    other.kill()
    other.join()
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: text for path, text in before.items() if tmp_path / "sft" in path.parents} == {
        path: text for path, text in left.items() if tmp_path / "sft" in path.parents
    }
    both.open(overwrite=True)
    assert not (tmp_path / "sft" / "model.safetensors").exists()


def test_a_folder_left_by_a_kill_and_a_broken_stage_file_can_be_mended(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / ".stage.json").write_text("{")
    open_stages([stage(tmp_path)])
    (tmp_path / "sft" / "stage.json").write_text("{")
    with pytest.raises(HFTError, match="--overwrite"):
        open_stages([stage(tmp_path)])
    open_stages([stage(tmp_path)], overwrite=True)


@pytest.mark.parametrize(
    "flags",
    [
        "--sft.logging_steps 1",
        "--sft.save_steps 7",
        "--sft.report_to none",
        "--sft.disable_tqdm true",
        "--sft.save_total_limit 5",
        "--sft.per_device_eval_batch_size 1",
        "--sft.ddp_timeout 7200",
        r"--sft.gradient_checkpointing true --sft.gradient_checkpointing_kwargs {\"use_reentrant\":false}",
        "--sft.activation_checkpointing true",
        "--sft.per_device_train_batch_size 8 --sft.gradient_accumulation_steps 4",
    ],
)
def test_settings_that_leave_the_weights_alone_may_change(tmp_path, flags):
    open_stages([stage(tmp_path)])
    (tmp_path / "sft" / "checkpoint-1").mkdir()
    open_stages([stage(tmp_path, flags)])
    assert (tmp_path / "sft" / "checkpoint-1").is_dir()


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ("--sft.learning_rate 0.5", "sft.learning_rate"),
        ("--sft.seed 7", "sft.seed 42 there, 7 here"),
        ("--hft.ratio 0.3", "hft.ratio 0.5 there, 0.3 here"),
        ("--sft.method fft", "hft.method 'hft' there, 'fft' here"),
        ("--sft.split train[:10]", "data.split"),
        ("--model.dtype bfloat16", "model.dtype"),
        ("--sft.eos_token x", "sft.eos_token None there, 'x' here"),
        ("--sft.pad_token x", "sft.pad_token None there, 'x' here"),
        ("--sft.load_best_model_at_end --sft.eval_strategy steps", "sft.load_best_model_at_end"),
    ],
)
def test_settings_that_change_the_weights_may_not(tmp_path, flags, difference):
    open_stages([stage(tmp_path)])
    (tmp_path / "sft" / "checkpoint-1").mkdir()
    with pytest.raises(HFTError) as error:
        open_stages([stage(tmp_path, flags)])
    assert difference in str(error.value)
    open_stages([stage(tmp_path, flags)], overwrite=True)
    open_stages([stage(tmp_path, flags)])


def test_overwrite_removes_a_stage_and_nothing_else(tmp_path):
    open_stages([stage(tmp_path)])
    (tmp_path / "sft" / "old.safetensors").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    open_stages([stage(tmp_path)], overwrite=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["_run.lock", "notes.txt", "sft", "stage.json"]
    (tmp_path / "other" / "sft").mkdir(parents=True)
    (tmp_path / "other" / "sft" / "thesis.txt").write_text("mine")
    with pytest.raises(HFTError, match="contains other files"):
        open_stages([stage(tmp_path / "other")], overwrite=True)


@pytest.mark.parametrize("flag", ["--model", "--retention.texts"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_holds_what_the_run_reads_is_rejected_and_keeps_it(run, tmp_path, flag, overwrite):
    """The start model of a run in its own folder would be deleted by overwrite."""
    finished_run = run()
    finished_run.open()
    for name in ("sft", "dpo"):
        finished_run.train(name, 1.0)
    source = tmp_path / "dpo" if flag == "--model" else tmp_path / "dpo" / "model.safetensors"
    before = sorted(tmp_path.rglob("*"))
    words = ["--config", str(demo.RECIPE), "--output_dir", str(tmp_path), flag, str(source)]
    stages = parse_recipe(words).stages.values()
    with pytest.raises(HFTError, match=r"holds .*dpo.*, which the run reads: choose another"):
        open_stages(stages, overwrite)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "read",
    [
        "datasets: [{path: json, data_files: FOLDER/rows.jsonl}]",
        "datasets: [{path: json, data_files: {train: [FOLDER/*.jsonl]}}]",
        "datasets: [{path: FOLDER}]",
        "dataset: demo, chat_template_path: FOLDER/rows.jsonl",
    ],
)
def test_parts_of_a_mixture_and_templates_are_kept_too(tmp_path, read):
    folder, config = tmp_path / "run" / "dpo", tmp_path / "config.yaml"
    parse = ["--config", str(config), "--output_dir", str(folder.parent)]
    config.write_text("model: demo\nsft: {dataset: demo}\ndpo: {dataset: demo, split: train_prefs}\n")
    open_stages(parse_recipe(parse).stages.values())
    (folder / "rows.jsonl").write_text("mine")
    config.write_text(f"model: demo\nsft: {{{read.replace('FOLDER', str(folder))}}}\ndpo: {{dataset: demo}}\n")
    with pytest.raises(HFTError, match=r"holds .*dpo.*, which the run reads: choose another"):
        open_stages(parse_recipe(parse).stages.values(), overwrite=True)
    assert (folder / "rows.jsonl").read_text() == "mine"


@pytest.mark.parametrize("word", ["{}", "--config={}"])
def test_the_file_of_settings_may_lie_in_the_folder_and_is_kept(tmp_path, monkeypatch, word):
    open_stages([stage(tmp_path)])
    config = tmp_path / "sft" / "mine.yaml"
    config.write_text("mine")
    monkeypatch.setattr("sys.argv", ["sft.py", word.format(config)])
    open_stages([stage(tmp_path)])
    with pytest.raises(HFTError, match=r"holds .*mine\.yaml', which the run reads"):
        open_stages([stage(tmp_path)], overwrite=True)
    assert config.exists()


def test_a_folder_within_the_data_is_rejected(tmp_path):
    """What a run writes would count as changed data, and no run could be resumed."""
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(HFTError, match=r"lies in the data, .*: choose one outside"):
        open_stages([stage(tmp_path / "runs", f"--sft.dataset {tmp_path}")])


@pytest.mark.parametrize(
    ("token", "said"), [(None, "Token is required"), ("hf_a", "offline mode"), ({"role": "read"}, "may only read")]
)
def test_a_push_that_cannot_work_is_found_before_an_earlier_stage_trains(run, monkeypatch, token, said):
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: token)
    if isinstance(token, dict):
        monkeypatch.setattr("hft_trl.recipe.folder.whoami", lambda **_: {"auth": {"accessToken": token}})
    with pytest.raises(HFTError, match=f"dpo: push_to_hub is true, but no model can be pushed .*{said}"):
        run("--dpo.push_to_hub true").open()


def test_a_finished_stage_needs_no_hub(run):
    both = run("--sft.push_to_hub true")
    run().open()
    both.train("sft", 1.0)
    both.open()


def test_a_folder_that_can_not_be_written_is_refused_before_anything_else(tmp_path, monkeypatch):
    """Also for root, whom permissions don't stop: a read-only file system does."""

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("hft_trl.recipe.folder.os.open", refuse)
    with pytest.raises(HFTError, match=r"sft cannot be written \(Read-only file system; "):
        open_stages([stage(tmp_path)])


def test_a_secret_is_never_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")  # as before, when the test ends
    words = '--sft.hub_token hf_secret --sft.model_init_kwargs \'{"api_key": "hunter2", "token": "hf_secret"}\''
    open_stages([stage(tmp_path, words)])
    written = (tmp_path / "sft" / "stage.json").read_text()
    assert "hf_secret" not in written
    assert "hunter2" not in written


@examples(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-7, 1e-1))
def test_settings_are_stable_json(tmp_path_factory, seed, rate):
    folder = tmp_path_factory.mktemp("stable")
    flags = f"--sft.seed {seed} --sft.learning_rate {rate!r}"
    assert settings(stage(folder, flags)) == settings(stage(folder, flags))


def test_what_a_trainer_writes_into_its_arguments_is_no_other_setting_of_a_rerun(tmp_path):
    """Under ZeRO-3 it switches checkpointing to the reentrant one. A run that was killed since has to resume."""
    first = stage(tmp_path)
    open_stages([first])
    first.args.gradient_checkpointing_kwargs = {"use_reentrant": True}
    mark_started(first)
    (first.folder / "checkpoint-1").mkdir()
    open_stages([stage(tmp_path)])
