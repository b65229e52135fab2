"""
`hft-trl sft`, `dpo` and `chain` are the recipes under `accelerate launch`, and need no clone.

The run of `tests/recipes/test_recipes.py` is one of `chain`.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, SFTConfig
from typer.testing import CliRunner

from hft_trl import HFTError, demo
from hft_trl.cli import app, launch
from hft_trl.recipe.arguments import StageArguments
from hft_trl.recipe.parsing import keys
from hft_trl.recipe.recipe import parse_recipe, section_keys

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("argv", "of_accelerate", "of_the_recipe"),
    [
        ("--num_processes 2 --learning_rate 1e-5", "--num_processes 2", "--learning_rate 1e-5"),
        ("--learning_rate=1 --num-processes=2 --bf16 true", "--num-processes 2", "--learning_rate=1 --bf16 true"),
        ("--sft.debug x --multi_gpu --model demo", "--multi_gpu", "--sft.debug x --model demo"),
        ("--datasets a b --machine_rank 1", "--machine_rank 1", "--datasets a b"),
        ("--gradient_accumulation_steps 2 --debug underflow_overflow", "", None),
        ("--lerning_rate 1", "", None),
    ],
)
def test_a_flag_goes_to_whom_it_belongs_and_an_unknown_one_to_the_recipe(argv, of_accelerate, of_the_recipe):
    """The recipe names the nearest key, which accelerate would not."""
    expected = argv if of_the_recipe is None else of_the_recipe
    assert launch.split_flags(argv.split()) == (of_accelerate.split(), expected.split())


def test_no_other_flag_of_accelerate_is_one_of_a_recipe():
    types = (ScriptArguments, SFTConfig, DPOConfig, ModelConfig, DatasetMixtureConfig, StageArguments)
    ours = {*keys(types), *section_keys({"sft": SFTConfig, "dpo": DPOConfig})[""]}
    assert ours & vars(launch_command_parser().parse_args(["script"])).keys() == launch.OF_THE_RECIPE


def test_an_accelerate_config_is_a_file_or_a_name_of_ours_or_of_trls(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("num_processes: 2\n")
    for name, folder in ((str(own), tmp_path), ("fsdp2", ROOT / "accelerate_configs"), ("fsdp1", None)):
        (flag, path), flags = launch.split_flags(["--accelerate_config", name, "--seed", "1"])
        assert (flag, flags) == ("--config_file", ["--seed", "1"])
        assert Path(path).is_file()
        assert folder in (Path(path).parent, None)
    for words in (["nothing"], []):
        with pytest.raises(HFTError, match="Names of this package: cpu2, ddp"):
            launch.split_flags(["--accelerate_config", *words])


ENDINGS = {"": 0, "sys.exit(2)": 2, "sys.exit(1)": 1, "os.kill(os.getpid(), 15)": 143}


@pytest.mark.parametrize(("config", "ending"), [*(("single", ending) for ending in ENDINGS), ("cpu2", "sys.exit(2)")])
def test_the_exit_code_is_the_recipe_s(tmp_path, monkeypatch, config, ending):
    """In one process and in two. `accelerate launch` exits with 1 whatever the code was."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "sft.py").write_text(f"import os, sys\n{ending}\n")
    monkeypatch.setattr(launch, "PACKAGE", tmp_path)
    result = run("sft", "--config_file", ROOT / "accelerate_configs" / f"{config}.yaml")
    assert result.exit_code == ENDINGS[ending], result.output


def test_help_is_the_recipe_s_with_its_flags(monkeypatch):
    monkeypatch.setattr("sys.argv", ["hft-trl"])  # which the recipe reads, and the command replaces
    for command, recipe, flag in (
        ("sft", "sft", "--ratio"),
        ("dpo", "dpo", "--beta"),
        ("chain", "sft_then_dpo", "--hft.ratio"),
    ):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert f"accelerate launch recipes/{recipe}.py" in result.stdout
        assert f"{flag} float" in result.stdout


@pytest.mark.parametrize(
    "name", [path.stem for path in [*ROOT.glob("recipes/*.py"), *ROOT.glob("recipes/configs/*.yaml")]]
)
def test_every_recipe_and_config_is_copied_with_its_other_half_and_nothing_is_overwritten(tmp_path, name):
    folder = tmp_path / "else" / "where"
    result = run("recipe", "copy", name, folder)
    assert result.exit_code == 0, result.output
    copies = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert all(str(folder / copy) in result.stdout for copy in copies)
    (recipe,) = folder.glob("*.py")
    assert recipe.read_bytes() == (ROOT / "recipes" / recipe.name).read_bytes()
    config = ROOT / "recipes" / "configs" / f"{name}.yaml"
    for copy in copies:  # an edited config that is not named would have no effect
        assert (f"--config {folder / copy}," in result.stdout) is copy.endswith(".yaml")
    if config.exists():
        assert copies[config.name] == config.read_bytes()
        assert f"recipes/{recipe.name}" in config.read_text()
    else:
        assert recipe.stem == name
    for copy in copies:
        (folder / copy).write_text("mine")
    again = run("recipe", "copy", name, folder)
    assert again.exit_code == 2
    assert "no file is overwritten" in again.output
    assert {path.read_text() for path in folder.iterdir()} == {"mine"}


@pytest.mark.parametrize("taken", ["sft_then_dpo.py", "sft_then_dpo.yaml"])
def test_a_copy_that_cannot_be_whole_writes_nothing(tmp_path, taken):
    (tmp_path / taken).write_text("mine")
    assert run("recipe", "copy", "sft_then_dpo", tmp_path).exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == [taken]


@pytest.mark.parametrize("place", ["file", "file/sub"])
def test_a_copy_into_a_file_is_rejected(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    result = run("recipe", "copy", "sft_then_dpo", tmp_path / place)
    assert result.exit_code == 2
    assert "which cannot be written" in result.output


def test_the_copied_config_is_what_the_recipe_runs_without_one(tmp_path):
    run("recipe", "copy", "sft_then_dpo", tmp_path)
    stages = {"sft": SFTConfig, "dpo": DPOConfig}
    copied = parse_recipe(["--config", str(tmp_path / "sft_then_dpo.yaml")], stages)
    default = parse_recipe([], stages, default_config=demo.RECIPE)
    assert copied.run == default.run
    for one, other in zip(copied.stages.values(), default.stages.values(), strict=True):
        assert (one.hft, one.data, one.args.to_dict()) == (other.hft, other.data, other.args.to_dict())


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    result = run("recipe", "copy", "sft_and_dpo", tmp_path)
    assert result.exit_code == 2
    assert all(word in result.output for word in ("'sft_and_dpo'", "sft_then_dpo", "llama3.1-8b-24gb"))


def test_a_wheel_has_every_module_recipe_and_configuration(tmp_path):
    """The packages are listed in pyproject.toml, where a new one may be forgotten."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    for name in ("hft_trl", "recipes", "accelerate_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hft_trl/")}
    files = [path for path in (ROOT / "hft_trl").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {str(path.relative_to(ROOT)) for path in files}
    outside = [*ROOT.glob("recipes/**/*.py"), *ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("accelerate_configs/*.yaml")]
    expected |= {f"hft_trl/{path.relative_to(ROOT)}" for path in outside}
    assert held == expected
