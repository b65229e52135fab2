"""`hft-trl plan`: what it prints, writes and refuses, and the shapes that come with the package."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import parse_recipe, tiny_llama
from typer.testing import CliRunner

from hft_trl import HFTConfig, HFTError
from hft_trl.cli import app
from hft_trl.cli.plan import parse_memory
from hft_trl.planning.fit import Plan
from hft_trl.planning.memory import LAYOUTS, Storage, Task, awaiting_reduction, held, sizes
from hft_trl.planning.show import write
from hft_trl.selection import select
from hft_trl.skeleton import SHAPES, build_on_meta, shape_of

ROOT = Path(__file__).parents[2]
# As published: bytes of the safetensors files on the hub by two
PARAMETERS = {
    "HuggingFaceTB/SmolLM3-3B-Base": 3_075_098_624,
    "Qwen/Qwen3-0.6B-Base": 596_049_920,
    "Qwen/Qwen3-4B-Base": 4_022_468_096,
    "Qwen/Qwen3-8B-Base": 8_190_735_360,
    "allenai/Olmo-3-7B-Think-SFT": 7_298_011_136,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that holds a config and nothing else."""
    path = tmp_path_factory.mktemp("config")
    tiny_llama(300).config.save_pretrained(path)
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def as_json(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_both_methods_stand_side_by_side(folder):
    result = run(folder, "--gpu-memory", "24GB")
    assert result.exit_code == 0, result.output
    assert re.search(r"GB on each GPU +FFT +HFT", result.stdout)
    for row in (
        "trainable weights",
        "frozen weights",
        "gradients",
        "optimizer state",
        "activations",
        "tiles of logits",
    ):
        assert row in result.stdout
    assert "SFT, 128 tokens, batch 128, 1 GPU of 24 GB" in result.stdout  # as many tokens as it has positions


def test_json_is_one_object_whose_parts_add_up(folder):
    """Of one method if asked, else of both; with the ratio of what is computed."""
    found = as_json(folder, "--stage", "dpo", "--gpus", 2, "--global-batch", 8)
    assert list(found["plans"]) == ["fft", "hft"]
    for plan in found["plans"].values():
        assert plan["total"] == sum(plan["memory"].values())
        assert plan["per_device_train_batch_size"] * plan["gradient_accumulation_steps"] * 2 == 8
        assert plan["fits"] is True
        assert plan["missing"] == 0
    assert 0.6 < found["operations_ratio"]["equal_settings"] < 1
    assert found["plans"]["hft"]["memory"]["optimizer"] < found["plans"]["fft"]["memory"]["optimizer"]
    assert list(as_json(folder, "--method", "hft")["plans"]) == ["hft"]


def test_a_model_that_does_not_fit_is_an_answer(tmp_path):
    """Exit code 0: what is missing, and what would help."""
    tiny_llama(8_000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=6).config.save_pretrained(tmp_path)
    arguments = [tmp_path, "--method", "fft", "--gpu-memory", "4GB", "--sequence-length", 64]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert re.search(r"FFT does not fit: [\d.]+ GB are missing on each GPU", result.stdout)
    assert re.search(r"--gpus \d+: [\d.]+ GB, fits", result.stdout)
    helpless = run(*arguments, "--global-batch", 1, "--optim", "adamw_bnb_8bit")
    assert re.search(r"GB are missing on each GPU\. No other flag would help\.\n", helpless.stdout)
    refused = run(*arguments, "--write", tmp_path / "out")
    assert refused.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_tight_fit_is_said(folder):
    """Below 3 % of what is available; what is computed may be wrong by as much."""
    arguments = [folder, "--method", "hft", "--global-batch", 1]
    total = as_json(*arguments)["plans"]["hft"]["total"]
    tight, roomy = (f"{(10**9 + total / share) / 1e6:.3f}MB" for share in (0.98, 0.96))
    assert "HFT fits with 2.0 % left: " in run(*arguments, "--gpu-memory", tight).stdout
    assert as_json(*arguments, "--gpu-memory", tight)["plans"]["hft"]["left"] == pytest.approx(0.02, rel=1e-2)
    assert "left: " not in run(*arguments, "--gpu-memory", roomy).stdout


def test_progress_is_shown_on_standard_error_but_not_with_json(folder, monkeypatch):
    """And nothing where that is no terminal."""
    arguments = ["plan", str(folder), "--method", "fft", "--global-batch", "1"]
    assert CliRunner().invoke(app, arguments).stderr == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rich.status.Status.update", lambda _, text: sys.stderr.write(f"{text}\n"))
    shown = CliRunner().invoke(app, arguments)
    assert "Reading the config of" in shown.stderr
    assert "FFT: tracing a step, micro-batch 1, no checkpointing" in shown.stderr
    assert "tracing" not in shown.stdout
    assert "Reading" not in CliRunner().invoke(app, [*arguments, "--json"]).stderr


def test_an_output_that_cannot_be_written_is_said_before_anything_is_planned(folder, tmp_path, monkeypatch):
    """And in the words of a plan, which resumes nothing."""
    monkeypatch.setattr("hft_trl.skeleton.build_on_meta", lambda *_: pytest.fail("the model was built"))
    (tmp_path / "file").write_text("")
    result = run(folder, "--write", tmp_path / "file" / "out")
    assert result.exit_code == 2, result.output
    assert "which cannot be written (Not a directory): choose another folder" in result.stderr
    assert "resumes" not in result.stderr
    (tmp_path / "recipe.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path, ""):  # empty, as an unset variable of a shell, is the working directory as in other commands
        assert "recipe.yaml' exists: choose another folder" in run(folder, "--write", out).stderr


SMALLEST = [
    *("--frozen-quantization", "nf4", "--optimizer-in-backward", "--no-train-embeddings"),
    *("--global-batch", 4),
]


@pytest.mark.parametrize(
    ("gpus", "stage", "more"),
    [
        (1, "sft", ["--frozen-dtype", "bfloat16"]),
        (8, "dpo", ["--method", "fft", "--launch", "fsdp2"]),
        (16, "sft", []),
        (1, "sft", SMALLEST),
    ],
)
def test_what_is_written_parses_and_launches(folder, tmp_path, gpus, stage, more):
    """The recipe's own parser reads the plan back, and accelerate the launch line."""
    out = tmp_path / "planned: for us #1"  # a path that neither YAML nor a shell reads as it is
    arguments = [folder, "--gpus", gpus, "--stage", stage, "--sequence-length", 64, "--write", out, *more]
    found = as_json(*arguments)
    recipe = parse_recipe(["--config", str(out / "recipe.yaml"), "--sft.use_cpu", "true", "--dpo.use_cpu", "true"])
    method = "fft" if "fft" in more else "hft"
    plan, args = found["plans"][method], recipe.stages[stage].args
    assert args.per_device_train_batch_size == plan["per_device_train_batch_size"]
    assert args.gradient_accumulation_steps == plan["gradient_accumulation_steps"]
    assert args.gradient_checkpointing == (plan["activation_checkpointing"] != "none")
    assert (args.max_length, args.bf16) == (64, True)
    for one in (recipe.stages["sft"], recipe.stages["dpo"]):
        assert one.hft.method == method
        assert one.hft.frozen_dtype == ("bfloat16" if "--frozen-dtype" in more else None)
        assert one.hft.frozen_quantization == ("nf4" if more is SMALLEST else None)
        assert one.hft.optimizer_in_backward == (more is SMALLEST)
        assert one.hft.train_embeddings == (more is not SMALLEST)
    assert recipe.stages["sft"].model.model_name_or_path == str(folder)
    assert recipe.run.output_dir == str(out / "run")

    script = (out / "launch.sh").read_text()
    (line,) = [line for line in script.splitlines() if line.startswith("accelerate launch")]
    assert line in (out / "recipe.yaml").read_text()
    words = shlex.split(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", line))
    launch = launch_command_parser().parse_args(words[2:])
    config = yaml.safe_load((ROOT / launch.config_file).read_text())
    assert config["num_machines"] == max(gpus // 8, 1)
    assert (launch.num_processes or config["num_processes"]) == gpus
    assert launch.training_script_args == ["--config", str(out / "recipe.yaml")]
    again = run(*arguments)
    assert again.exit_code == 2
    assert "exists: choose another folder" in again.output


def test_layers_by_turns_and_divided_gradients_reach_the_trainer(tmp_path):
    """`selective` is transformers' `every_n_layers`; `sync_each_batch` is accelerate's, in a stage that needs it."""
    task = Task("sft", 1, 80 * 10**9, 64, 8)
    plans = {name: (task, Plan("hft", "single", 2, 4, n, {}, 0, 0, 1, n > 0)) for name, n in (("sft", 2), ("dpo", 0))}
    recipe, _ = write(str(tmp_path), "demo", HFTConfig(), plans)
    stages = parse_recipe(["--config", str(recipe), "--sft.use_cpu", "true", "--dpo.use_cpu", "true"])
    kwargs = [stage.args.accelerator_config.gradient_accumulation_kwargs for stage in stages.stages.values()]
    assert kwargs == [{"sync_each_batch": True}, None]
    args = stages.stages["sft"].args
    assert args.activation_checkpointing is True
    assert args.activation_checkpointing_kwargs == {"every_n_layers": 2}


def test_what_is_written_is_found_from_any_folder(folder, tmp_path, monkeypatch):
    """
    Of a relative folder and model; a hub id with its revision and its own code, and the word demo, stay as they are.
    """
    task = Task("sft", 1, 80 * 10**9, 64, 8)
    plans = dict.fromkeys(("sft", "dpo"), (task, Plan("hft", "single", 2, 4, 0, {}, 0, 0, 1)))
    monkeypatch.chdir(folder.parent)
    for model, given, expected in (
        (folder.name, {}, {"model_name_or_path": str(folder)}),
        ("demo", {}, {"model_name_or_path": "demo"}),
        (
            "some/model",
            {"revision": "1234567", "trust_remote_code": True},
            {"model_name_or_path": "some/model", "model_revision": "1234567", "trust_remote_code": True},
        ),
    ):
        out = tmp_path / "out" / model
        recipe, launch = write(os.path.relpath(out), model, HFTConfig(), plans, **given)
        assert (recipe, launch) == (out / "recipe.yaml", out / "launch.sh")
        written = yaml.safe_load(recipe.read_text())
        assert written["model"] == {**expected, "dtype": "float32"}
        assert written["output_dir"] == str(out / "run")
        assert f"--config {recipe}" in launch.read_text()


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("24 GB", 24 * 10**9), ("1.5TB", 15 * 10**11), ("80gib", 80 * 2**30)]
)
def test_sizes_are_decimal_or_binary_as_written(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["80G B", "80", "GB", "-5GB", "80 Go", "0.5GB"])
def test_a_size_that_is_none_is_named(text):
    with pytest.raises(HFTError, match=re.escape(f"--gpu-memory is {text!r}")):
        parse_memory(text)


def test_gpus_of_a_part_of_a_machine_are_refused(folder):
    result = run(folder, "--gpus", 12, "--global-batch", 24)
    assert result.exit_code == 2
    assert "--gpus is 12: with more than one machine of 8 GPUs, use a multiple of 8" in " ".join(result.output.split())


def test_more_tokens_than_positions_are_refused(folder):
    result = run(folder, "--sequence-length", 256)
    assert result.exit_code == 2
    assert "has 128 positions" in result.output


def test_the_built_in_shapes_have_the_published_sizes_and_types():
    assert {str(path.parent.relative_to(SHAPES)) for path in SHAPES.glob("*/*/config.json")} == PARAMETERS.keys()
    for name, published in PARAMETERS.items():
        skeleton = build_on_meta(str(SHAPES / name))
        assert sum(p.numel() for p in skeleton.parameters()) == published
        assert skeleton.config.dtype == (torch.float16 if "Llama-2" in name else torch.bfloat16)


def test_help_and_documentation_name_every_built_in_shape():
    """Written out in the help, since reading the folder would cost every command a start."""
    shown = run("--help").stdout
    page = (ROOT / "docs/plan.md").read_text()
    for name in PARAMETERS:
        owner, _, rest = name.partition("/")
        assert f"{owner}/" in re.sub(r"\s+", " ", shown)
        assert rest.split("-", 2)[-1] in shown
        assert name in page


def test_every_recipe_s_model_is_built_in_or_needs_no_hub():
    """So that a recipe's machine can be planned before there is access to its model."""
    for path in (ROOT / "recipes/configs").glob("*.yaml"):
        keys = yaml.safe_load(path.read_text())
        assert keys.get("model", keys)["model_name_or_path"] in {*PARAMETERS, "smollm2"}


@pytest.mark.parametrize("name", ["llama2-7b", "llama2-13b", "llama3.1-8b", "trace-llama2-7b-chat", "qwen3-4b"])
def test_the_header_of_a_recipe_says_what_is_planned(name):
    """
    State, reference and whole gradients, under the launch configuration of its launch line; activations are not traced
    here. The main memory of all processes, and the hours by the header's own assumptions.
    """
    text = (ROOT / f"recipes/configs/{name}.yaml").read_text()
    said = re.sub(r"\n#\s+", " ", text[: text.index("\nmodel:")])
    (launch,) = re.findall(r"accelerate_configs/(\w+)\.yaml recipes", said)
    skeleton = build_on_meta(shape_of(yaml.safe_load(text)["model"]["model_name_or_path"]))
    counted = {method: sizes(skeleton, select(skeleton, HFTConfig(method=method))) for method in ("hft", "fft")}
    found = {}
    for method, numbers in counted.items():
        alone = held(numbers, LAYOUTS[launch], 1, Storage(), True)
        reference = alone.pop("reference")
        del alone["communication"]
        whole = awaiting_reduction({"gradients": 0}, numbers)["gradients"]
        found[method] = [f"{number / 1e9:.0f} GB" for number in (sum(alone.values()), reference, whole)]
    half, full = found["hft"], found["fft"]
    assert f"about {half[0]} of weights (float32), gradients and AdamW state" in said
    assert f"(FFT: {full[0]})" in said
    if "DPO" in said:
        assert f"{half[1]} more for the reference" in said
        assert half[1] == full[1] or f"(FFT: {full[1]})" in said
    processes = 8 if launch == "fsdp2" else 1
    parameters = skeleton.num_parameters() / 1e9
    assert f"{4 * parameters * processes:.0f} GB of main memory" in said
    seconds_per_token = parameters / 6.738 / (8600 * processes)
    if "DPO" in said:
        sft, dpo = (yaml.safe_load(text)[stage]["num_train_epochs"] for stage in ("sft", "dpo"))
        hours = [tokens * seconds_per_token / 3600 for tokens in (0.31e9 * sft, 4 / 3 * 0.05e9 * dpo)]
        assert f"about {hours[0]:.1f} for SFT and {hours[1]:.1f} for DPO, estimated, not measured" in said
    else:
        assert f"at most {5000 * 40 * 1536 * seconds_per_token / 3600:.1f} for training, estimated" in said
    if launch == "fsdp2":
        assert f"gradients that accumulate are whole in bfloat16, {half[2]} (FFT: {full[2]}) on each" in said


def test_a_built_in_shape_needs_no_network():
    """Its config is the package's own, and the hub is off in these tests."""
    assert shape_of("meta-llama/Llama-2-7b-hf") == str(SHAPES / "meta-llama/Llama-2-7b-hf")
    result = run("meta-llama/Llama-2-7b-hf", "--gpus", "1", "--gpu-memory", "24GB")
    assert result.exit_code == 0, result.output
    assert "HFT does not fit" in result.stdout
    fitting = re.findall(r"--gpus (\d): [\d.]+ GB, fits with sync_each_batch", result.stdout)
    assert fitting == ["8", "4"]  # FFT's and HFT's
    assert "--dtype" not in result.stdout  # Llama 2 is published in float16


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--dtype", "bfloat16"), "--dtype is bfloat16, which rounds the model's weights from float16"),
        (
            ("--gpus", 8, "--launch", "zero3"),
            "--launch is zero3, which rounds the model's weights from float16 to bfloat16",
        ),
    ],
)
def test_a_type_that_a_run_would_refuse_is_refused(flags, words):
    """Before a step is traced: the frozen half has to keep the bits of the published weights."""
    result = run("meta-llama/Llama-2-7b-hf", *flags)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


IN_24_GB = ["--optim", "adamw_bnb_8bit", "--frozen-quantization", "nf4", "--optimizer-in-backward"]
# Peaks of `benchmarks/step_run.py` on an H200 (benchmarks/README.md), in GB
MEASURED = {
    ("meta-llama/Llama-2-7b-hf", "fft"): (90.9, "143GB", 2048, 4, "none", []),
    ("meta-llama/Llama-2-7b-hf", "hft"): (72.6, "143GB", 2048, 4, "none", []),
    ("meta-llama/Llama-3.1-8B", "hft"): (22.8, "24GB", 1024, 1, "full", ["--no-train-embeddings", *IN_24_GB]),
}


@pytest.mark.long
@pytest.mark.parametrize(("shape", "method"), MEASURED)
def test_the_plan_is_within_five_percent_of_what_a_gpu_needed(tmp_path, shape, method):
    """The benchmark's model has bfloat16 weights, whatever type the published one has."""
    peak, memory, length, rows, checkpointing, flags = MEASURED[shape, method]
    config = json.loads((SHAPES / shape / "config.json").read_text())
    config.pop("torch_dtype", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    setting = ["--gpu-memory", memory, "--sequence-length", length, "--global-batch", rows, "--dtype", "bfloat16"]
    plan = as_json(tmp_path, "--method", method, *setting, *flags)["plans"][method]
    assert plan["activation_checkpointing"] == checkpointing
    assert plan["total"] / 1e9 == pytest.approx(peak, rel=0.05)
