"""The recipes as a user runs them: through `accelerate launch`, on files in the hub's schemas, to the last output."""

import gc
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, started_from, tiny_llama
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

from hft_trl import HFTDPOTrainer, HFTSFTTrainer
from hft_trl.evaluation.run import evaluate_models

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/single.yaml"]
CHAIN = [sys.executable, "-c", "from hft_trl.cli import main; main()", "chain", "--accelerate_config", "single"]
STAGE_FIELDS = {
    "name", "method", "selection_digest", "share", "trainable_params", "total_params", "steps", "tokens",
    "tokens_per_second", "runtime_seconds", "peak_memory_bytes", "optimizer_state_bytes", "first_loss", "last_loss",
    "frozen_unchanged",
}  # fmt: skip
QUICK = ["--sft.max_steps", "6", "--sft.save_steps", "2", "--dpo.max_steps", "4", "--dpo.save_steps", "2"]


def run(*command, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False, **settings)


@pytest.fixture
def recipe(monkeypatch, capsys):
    """Runs a recipe inside the test's process, where the libraries are loaded already."""

    def run_inside(name, *flags) -> subprocess.CompletedProcess:
        command = [f"recipes/{name}.py", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.chdir(ROOT)
        code = 0
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    return run_inside


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The embedded world through SFT and DPO, a few steps each, as `hft-trl chain` launches the recipe."""
    output = tmp_path_factory.mktemp("runs") / "h"
    result = run(*CHAIN, "--output_dir", str(output), *QUICK)
    assert result.returncode == 0, result.stderr[-3000:]
    return output, result


def test_a_run_leaves_models_selections_and_a_report(finished_run):
    output, result = finished_run
    report = json.loads((output / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["sft", "dpo"]
    for stage in report["stages"]:
        assert stage.keys() >= STAGE_FIELDS
        assert stage["method"] == "hft"
        assert stage["frozen_unchanged"] is True
        assert stage["share"]["layers"] == pytest.approx(0.5, abs=0.01)
        assert stage["trainable_params"] / stage["total_params"] == pytest.approx(stage["share"]["model"])
        assert all(stage[key] > 0 for key in ("steps", "tokens", "tokens_per_second", "runtime_seconds"))
        # AdamW keeps two float32 numbers per trainable parameter, and a step count per matrix
        assert stage["optimizer_state_bytes"] == pytest.approx(8 * stage["trainable_params"], rel=0.01)
        assert stage["peak_memory_bytes"] > 1e8
        folder = output / stage["name"]
        assert json.loads((folder / "hft_selection.json").read_text())["digest"] == stage["selection_digest"]
        AutoModelForCausalLM.from_pretrained(folder)
        assert "<|assistant|>" in AutoTokenizer.from_pretrained(folder).chat_template
        assert (folder / "trainer_state.json").is_file()
        card = (folder / "README.md").read_text()
        assert "Half Fine-Tuning" in card
        assert " on `demo`.\n" in card  # as the user named it, and no link
        moved = {unit["name"]: unit for unit in stage["moved"]}
        assert all((unit["relative_change_from_start"] > 0) == unit["trainable"] for unit in moved.values())
    sft, dpo = report["stages"]
    assert sft["reference_memory_bytes"] is sft["shared_reference_bytes"] is None
    assert dpo["reference_memory_bytes"] == 4 * dpo["trainable_params"]
    assert dpo["shared_reference_bytes"] == 4 * (dpo["total_params"] - dpo["trainable_params"])
    assert "reference, shared with the policy" in (output / "report.md").read_text()
    assert report["stages"][0]["selection_digest"] != report["stages"][1]["selection_digest"]
    assert report["evaluation"].keys() == {"base", "sft", "dpo"}
    assert all(scores.keys() >= {"knowledge", "ability"} for scores in report["evaluation"].values())
    assert report["evaluation"]["base"]["knowledge"] >= 99
    assert [(stage["batch_size"], stage["learning_rate"]) for stage in report["stages"]] == [(32, 1e-3), (32, 3e-5)]
    assert [list(sample) for sample in report["samples"]] == [["prompt", "base", "sft", "dpo"]] * 2
    assert str(output) not in (output / "report.md").read_text().replace(f"--output_dir {output}", "")
    assert [report["settings"][stage]["data"]["split"] for stage in ("sft", "dpo")] == ["train", "train_prefs"]
    kept = report["retention"]
    assert list(kept) == ["base", "sft", "dpo", "history"]
    assert {name: [row["step"] for row in rows] for name, rows in kept["history"].items()} == {
        "sft": [0, 6],
        "dpo": [0, 4],
    }
    assert all(kept[name].keys() == {"text_loss", "base_kl", "facts"} for name in ("base", "sft", "dpo"))
    assert kept["base"]["base_kl"] == 0 < kept["sft"]["base_kl"]
    for name in (
        "report.md",
        "report.html",
        "retention.png",
        "loss.png",
        "moved.png",
        "evaluation.png",
        "margins.png",
    ):
        assert (output / name).stat().st_size > 500, name
    assert "knowledge" in result.stdout
    for name, counts in (("sft", sft), ("dpo", dpo)):
        learn = f"{counts['trainable_params']:,} of {counts['total_params']:,} parameters learn"
        assert result.stdout.count(f"== {name}: HFT, {learn} (") == 1
    assert result.stdout.count("starts at step 0 ==") == 2
    assert result.stdout.endswith(f"report: {output}/report.html\nnext: hft-trl diff {output}/sft {output}/dpo\n")


def test_the_frozen_half_is_the_bases_byte_for_byte(finished_run):
    output, _ = finished_run
    for start, stage in ((ROOT / "hft_trl/demo/assets/model", "sft"), (output / "sft", "dpo")):
        before, after = load_file(start / "model.safetensors"), load_file(output / stage / "model.safetensors")
        frozen = json.loads((output / stage / "hft_selection.json").read_text())["frozen"]
        assert len(frozen) > 10
        assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in frozen)


def test_the_same_command_again_trains_nothing_and_writes_the_same_report(recipe, finished_run):
    output, _ = finished_run
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    stages = json.loads((output / "report.json").read_text())["stages"]
    result = recipe("sft_then_dpo", "--output_dir", output, *QUICK)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == before
    assert json.loads((output / "report.json").read_text())["stages"] == stages


def test_suites_run_on_the_base_and_every_stage(recipe, finished_run, tmp_path, monkeypatch):
    """`--evaluate demo` on a finished run trains nothing and puts scores, averages and errors into the report."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    output = shutil.copytree(finished_run[0], tmp_path / "run")

    def briefly(folders, suites, **options):
        return evaluate_models(folders, suites, limit=3, cache=tmp_path / "cache", **options)

    monkeypatch.setattr("hft_trl.recipe.evaluation.evaluate_models", briefly)
    result = recipe("sft_then_dpo", "--output_dir", output, *QUICK, "--evaluate", "demo")
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((output / "report.json").read_text())
    assert report["stages"] == json.loads((finished_run[0] / "report.json").read_text())["stages"]
    assert list(report["evaluation"]) == list(report["standard_errors"]) == ["base", "sft", "dpo"]
    assert report["evaluation"]["base"]["demo average"] == 50
    assert "±" in (output / "report.md").read_text()


def test_other_settings_in_the_same_folder_are_refused_with_the_difference(recipe, finished_run):
    output, _ = finished_run
    result = recipe("sft_then_dpo", "--output_dir", output, *QUICK, "--sft.learning_rate", "3e-4")
    assert result.returncode == 2
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "sft.learning_rate" in result.stderr
    assert "0.0003 here" in result.stderr
    assert "--overwrite" in result.stderr


def test_a_killed_run_continues_to_the_same_bytes(finished_run, tmp_path):
    """Killed without warning after a checkpoint of SFT, the same command ends with the model of a run in one go."""
    whole, _ = finished_run
    output = tmp_path / "killed"
    command = [sys.executable, "recipes/sft_then_dpo.py", "--output_dir", str(output), *QUICK]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while not (output / "sft" / "checkpoint-4" / "trainer_state.json").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "dpo" / "model.safetensors").exists()
    result = run(*command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"== sft: HFT, .* parameters learn \(.*%\), resumes at step [246] ==", result.stdout)
    for stage in ("sft", "dpo"):
        assert (output / stage / "model.safetensors").read_bytes() == (
            whole / stage / "model.safetensors"
        ).read_bytes()
    report = json.loads((output / "report.json").read_text())
    assert report["stages"][0]["resumed_from_step"] in (2, 4, 6)
    expected = json.loads((whole / "report.json").read_text())["retention"]
    for name in ("base", "sft", "dpo"):
        assert report["retention"][name] == expected[name]


def test_single_stages_chain_like_the_whole_recipe(recipe, tmp_path, finished_run):
    """recipes/sft.py and recipes/dpo.py with the demo's settings give the models of recipes/sft_then_dpo.py."""
    common = [
        "--max_length",
        "96",
        "--activation_checkpointing",
        "auto",
        "--report_to",
        "none",
        "--logging_steps",
        "2",
    ]
    sft = recipe(
        "sft", "--model_name_or_path", "demo", "--dataset_name", "demo", "--max_steps", 4, "--method", "fft",
        "--output_dir", tmp_path / "sft", *common,
    )  # fmt: skip
    assert sft.returncode == 0, sft.stderr[-3000:]
    assert "sft: activation checkpointing none" in sft.stdout
    dpo = recipe(
        "dpo", "--model_name_or_path", tmp_path / "sft", "--dataset_name", "demo", "--max_steps", 2,
        "--dataset_train_split", "train_prefs", "--output_dir", tmp_path / "dpo", *common,
    )  # fmt: skip
    assert dpo.returncode == 0, dpo.stderr[-3000:]
    records = [json.loads((tmp_path / name / "report.json").read_text())["stages"][0] for name in ("sft", "dpo")]
    assert [record["method"] for record in records] == ["fft", "hft"]
    assert records[0]["trainable_params"] == records[0]["total_params"]
    assert records[0]["frozen_unchanged"] is None
    assert (tmp_path / "dpo" / "report.md").is_file()
    assert (tmp_path / "dpo" / "report.html").is_file()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dpo")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sft.lerning_rate", "1"], ["sft.lerning_rate", "sft.learning_rate"]),
        (["--method", "half"], ["method", "half"]),
        (["--hft.ratio", "0"], ["hft.ratio", "0.0"]),
        (["--evaluate", "generally"], ["generally", "knowledge"]),
        (["--evaluate", "demo", "--model.trust_remote_code", "true"], ["evaluate", "trust_remote_code"]),
        (["--sft.dataset", "missing.jsonl"], ["missing.jsonl"]),
        (["--dpo.split", "tests"], ["tests", "train_prefs"]),
        (started_from("missing/folder/of/a/model"), ["missing/folder/of/a/model"]),
        (["--sft.max_length", "4"], ["max_length 4", "token to train on"]),
        (["--sft.bf16", "true"], ["bf16"]),
        (["--sft.eval_strategy", "steps"], ["sft", "eval_strategy", "eval_split"]),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(recipe, tmp_path, flags, words):
    output = tmp_path / "out"
    result = recipe("sft_then_dpo", "--output_dir", output, *flags)
    assert result.returncode == 2, result.stderr[-2000:]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.stderr
    assert all(word in errors[0] for word in words), errors[0]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_trackers_get_both_stages_as_from_trl(recipe, tmp_path):
    flags = [
        "--sft.report_to",
        "tensorboard",
        "--dpo.report_to",
        "tensorboard",
        "--sft.max_steps",
        2,
        "--dpo.max_steps",
        2,
    ]
    result = recipe(
        "sft_then_dpo", "--output_dir", tmp_path, *flags, "--sft.logging_steps", 1, "--dpo.logging_steps", 1
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for stage, tag in (("sft", "train/loss"), ("dpo", "train/rewards/margins")):
        (events,) = (tmp_path / stage).rglob("events.out.tfevents.*")
        log = EventAccumulator(str(events))
        log.Reload()
        assert [event.step for event in log.Scalars(tag)] == [1, 2]


def saved(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_can_not_be_trained_is_refused_before_anything_is_written(recipe, tmp_path, tokenizer, base):
    """No causal LM, quantized, without layers, without weights, torn weights: one line each, exit code 2."""
    bert = BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    classifier = saved(tmp_path / "classifier", BertForSequenceClassification(bert), tokenizer)
    empty = saved(tmp_path / "empty", tiny_llama(300, num_hidden_layers=0), tokenizer)
    quantized, bare, torn = (Path(shutil.copytree(base, tmp_path / name)) for name in ("quantized", "bare", "torn"))
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    (bare / "model.safetensors").unlink()
    (torn / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-100])
    for model, words in (
        (classifier, ["BertForSequenceClassification", "no causal LM"]),
        (quantized, ["quantized", "bitsandbytes"]),
        (empty, ["layers"]),
        (bare, ["holds no model.safetensors"]),
        (torn, ["missing or incomplete"]),
    ):
        result = recipe("sft_then_dpo", *started_from(model), "--output_dir", tmp_path / "out")
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert (result.returncode, len(errors)) == (2, 1), result.stderr[-1000:]
        assert all(word in errors[0] for word in words), errors[0]
        assert not (tmp_path / "out").exists()


def test_a_later_stage_without_the_model_it_came_from_is_refused(recipe, finished_run, tmp_path):
    output = tmp_path / "gap"
    shutil.copytree(finished_run[0], output)
    shutil.rmtree(output / "sft")
    result = recipe("sft_then_dpo", "--output_dir", output, *QUICK)
    assert result.returncode == 2
    assert "its start, holds no finished model" in result.stderr
    assert (output / "dpo" / "model.safetensors").is_file()


def test_a_real_process_exits_with_2_and_one_line(tmp_path):
    result = run(sys.executable, "recipes/sft_then_dpo.py", "--output_dir", str(tmp_path), "--hft.ratio", "0")
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["error: hft.ratio is 0.0: it must be a number in (0, 1], such as 0.5."]
    assert result.stdout == ""


def test_accelerate_launch_reports_exit_code_2(tmp_path):
    """The recipe exits with 2. accelerate says so, and itself exits with 1 on any failure of the script."""
    result = run(*LAUNCH, "recipes/sft_then_dpo.py", "--output_dir", str(tmp_path), "--sft.lerning_rate", "1")
    assert result.returncode != 0
    assert "did you mean sft.learning_rate?" in result.stderr
    assert "returned non-zero exit status 2" in result.stderr


def test_an_output_folder_of_something_else_is_left_alone(recipe, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "thesis.txt").write_text("ten years of work")
    for extra in ([], ["--overwrite"]):
        result = recipe("sft_then_dpo", "--output_dir", tmp_path, *extra)
        assert result.returncode == 2
        assert "contains other files" in result.stderr
    assert (tmp_path / "sft" / "thesis.txt").read_text() == "ten years of work"


def test_an_output_folder_that_is_a_file_is_refused(recipe, tmp_path):
    (tmp_path / "out").write_text("")
    result = recipe("sft_then_dpo", "--output_dir", tmp_path / "out")
    assert result.returncode == 2
    assert "cannot be written" in result.stderr


def test_overwrite_starts_afresh(recipe, finished_run, tmp_path):
    output = tmp_path / "again"
    shutil.copytree(finished_run[0], output)
    result = recipe("sft_then_dpo", "--output_dir", output, *QUICK, "--method", "fft", "--overwrite")
    assert result.returncode == 0, result.stderr[-3000:]
    stages = json.loads((output / "report.json").read_text())["stages"]
    assert [stage["method"] for stage in stages] == ["fft", "fft"]
    assert all(unit["relative_change"] > 0 for unit in stages[0]["moved"])


def test_nothing_of_the_sft_stage_is_held_when_dpo_begins(recipe, monkeypatch, tmp_path):
    """Its trainer holds itself, so it has to be collected: policy and reference need the room."""
    begin, held = HFTDPOTrainer.__init__, []

    def watched(self, *args, **kwargs):
        trainers = [thing for thing in gc.get_objects() if issubclass(type(thing), HFTSFTTrainer)]
        held.append([trainer.args.output_dir for trainer in trainers])
        begin(self, *args, **kwargs)

    monkeypatch.setattr(HFTDPOTrainer, "__init__", watched)
    gc.disable()  # else whether it was collected by then is chance
    try:
        result = recipe("sft_then_dpo", "--output_dir", tmp_path, "--sft.max_steps", 1, "--dpo.max_steps", 1)
    finally:
        gc.enable()
    assert result.returncode == 0, result.stderr[-2000:]
    (of_dpo,) = held
    assert str(tmp_path / "sft") not in of_dpo
