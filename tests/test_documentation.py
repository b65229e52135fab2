"""
The documentation is true:

every command parses down to the code, every snippet's names exist, every link leads somewhere.
"""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import parse_recipe
from trl import DPOConfig, SFTConfig
from typer.main import get_command

from hft_trl import demo
from hft_trl.cli import app
from hft_trl.cli.launch import COMMANDS, split_flags
from hft_trl.continual.continual_recipe import parse_continual
from hft_trl.experiments.frontier_trial import parse_frontier
from hft_trl.recipe import parse_stage

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
SOURCES = [
    *PAGES,
    *RECIPES,
    *sorted((ROOT / "recipes/configs").glob("*.yaml")),
    *sorted((ROOT / "accelerate_configs").glob("*.yaml")),
]


def commands(program: str) -> list[str]:
    """Every documented call of a program, without its prompt, comment or trailing words of a sentence."""
    found = set()
    for source in SOURCES:
        text = re.sub(r" \\\n#? *", " ", source.read_text())  # commands over several lines
        for line in text.splitlines():
            match = re.match(rf"[#$ ]*(?:Launch: +)?({program} [^`]+)$", line)
            if match:
                found.update(part.strip() for part in match[1].partition("   #")[0].split(" && "))
        found.update(re.findall(rf"`({program} [^`]+)`", text))
    return sorted(command for command in found if command.startswith(program))


@pytest.mark.parametrize("command", commands("accelerate launch"))
def test_every_launch_line_is_accepted(command, tmp_path, monkeypatch):
    """
    By accelerate up to the script, and by the recipe's own parser after it, except for the one shown as a mistake.
    """
    monkeypatch.setattr("hft_trl.demo.real_model.smollm2_path", lambda: str(demo.MODEL))  # it needs packages
    monkeypatch.setattr("hft_trl.trainers.compatibility.find_spec", lambda _: True)  # so do flash attention and Liger
    words = shlex.split(command)[2:]
    launch = launch_command_parser().parse_args(words)
    assert (ROOT / launch.training_script).is_file()
    if launch.config_file:
        assert yaml.safe_load((ROOT / launch.config_file).read_text())["compute_environment"] == "LOCAL_MACHINE"
    flags = [str(ROOT / word) if word.startswith("recipes/configs/") else word for word in launch.training_script_args]
    if "--sft.lerning_rate" in flags:
        return
    own = tmp_path / "my_trl.yaml"
    own.write_text("model_name_or_path: demo\ndataset_name: demo\noutput_dir: runs/own\nlearning_rate: 2.0e-5\n")
    flags = [str(own) if word == "my_trl.yaml" else word for word in flags]
    if launch.training_script.endswith("sft_then_dpo.py"):
        parse_recipe([*flags, "--sft.use_cpu", "true", "--dpo.use_cpu", "true"], default_config=demo.RECIPE)
    elif launch.training_script.endswith("continual.py"):
        parse_continual([*flags, "--sft.use_cpu", "true"], default_config=demo.CONTINUAL_RECIPE)
    elif launch.training_script.endswith("recipes/evaluate.py"):
        get_command(app).commands["evaluate"].make_context("evaluate", flags, resilient_parsing=False).close()
    else:
        name, config = ("sft", SFTConfig) if launch.training_script.endswith("sft.py") else ("dpo", DPOConfig)
        parse_stage(name, config, flags)


@pytest.mark.parametrize("command", commands("python recipes/frontier.py"))
def test_every_frontier_line_is_accepted(command, monkeypatch):
    monkeypatch.setattr("hft_trl.demo.real_model.smollm2_path", lambda: str(demo.MODEL))  # it needs packages
    words = shlex.split(command)[2:]
    parse_frontier([str(ROOT / word) if word.startswith("recipes/configs/") else word for word in words])


def test_there_are_launch_lines_to_check():
    assert len(commands("accelerate launch")) >= 10
    assert len(commands("python recipes/frontier.py")) >= 3


@pytest.mark.parametrize("command", commands("hft-trl"))
def test_every_hft_trl_line_is_accepted(command):
    root = get_command(app)
    words = shlex.split(command)[1:]
    name, *rest = words
    if name == "--help" or not rest:  # help, or the command's name in a sentence
        return
    root.commands[name].make_context(name, [*rest], resilient_parsing=False).close()
    flags = split_flags(rest)[1] if name in COMMANDS else []
    if name == "chain":
        parse_recipe(flags, default_config=demo.RECIPE)
    elif name in COMMANDS:
        parse_stage(name, SFTConfig if name == "sft" else DPOConfig, flags)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z]+)`?", (ROOT / "README.md").read_text()))))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_python_snippet_compiles_and_its_imports_exist(page):
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_imports_the_public_modules_only(recipe):
    text = recipe.read_text()
    assert len(text.splitlines()) <= 150
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("hft_trl"):
            assert not any(name.name.startswith("_") for name in node.names)
