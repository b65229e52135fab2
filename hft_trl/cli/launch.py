"""`hft-trl sft`, `dpo` and `chain` launch the recipes, and `hft-trl recipe copy` copies one out."""

import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from hft_trl import demo
from hft_trl.errors import HFTError, exit_on_user_error
from hft_trl.files import check_output

PACKAGE = Path(__file__).parents[1]
COMMANDS = {"sft": "sft", "dpo": "dpo", "chain": "sft_then_dpo"}  # and the recipe of each
# Of accelerate's flags, those that are the trainers' as well
OF_THE_RECIPE = {"debug", "gradient_accumulation_steps"}
# What a recipe runs without `--config`
DEFAULTS = {
    "sft_then_dpo": demo.RECIPE,
    "continual": demo.CONTINUAL_RECIPE,
    "frontier": demo.ASSETS / "frontier.yaml",
}

app = typer.Typer()
recipe_app = typer.Typer(help="Recipes that come with the package.", no_args_is_help=True, rich_markup_mode=None)


def shipped(name: str) -> Path:
    """Return a folder that is at the top of the repository, and inside of the installed package."""
    return next(folder for folder in (PACKAGE / name, PACKAGE.parent / name) if folder.is_dir())


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the flags of `accelerate launch` and those of the recipe."""
    from accelerate.commands.launch import launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    of_accelerate = {*vars(launch_command_parser().parse_args(["script"])), "accelerate_config"} - OF_THE_RECIPE
    launcher: list[str] = []
    recipe: list[str] = []
    flags = recipe
    for token in argv:
        is_flag = token.startswith("--")
        if is_flag:
            name = token[2:].partition("=")[0].replace("-", "_")
            flags = launcher if name in of_accelerate else recipe
        flags += token.split("=", 1) if is_flag and flags is launcher else [token]
    if "--accelerate_config" in launcher[:-1]:
        place = launcher.index("--accelerate_config") + 1
        own = shipped("accelerate_configs") / f"{launcher[place]}.yaml"
        launcher[place] = str(own) if own.is_file() else launcher[place]
    try:
        return resolve_accelerate_config_argument(launcher), recipe
    except ValueError as error:
        ours = ", ".join(sorted(path.stem for path in shipped("accelerate_configs").glob("*.yaml")))
        raise HFTError(f"{error} Names of this package: {ours}.") from error


def launch_recipe(ctx: typer.Context) -> None:
    """Run the recipe of a command with `accelerate launch`, and exit with its code."""
    script = shipped("recipes") / f"{COMMANDS[ctx.info_name or '']}.py"
    if {"-h", "--help"} & {*ctx.args}:
        sys.argv = [str(script), "--help"]
        runpy.run_path(str(script), run_name="__main__")
    from subprocess import CalledProcessError

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with exit_on_user_error():
        launcher, flags = split_flags(ctx.args)
    try:
        launch_command(launch_command_parser().parse_args([*launcher, str(script), *flags]))
    except CalledProcessError as error:
        code = error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    else:
        return
    raise typer.Exit(code if code >= 0 else 128 - code)  # the negative number of a signal, as shells report it


for _name, _recipe in COMMANDS.items():
    app.command(
        _name,
        help=f"Launch recipes/{_recipe}.py.",
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(launch_recipe)


@recipe_app.command("copy")
@exit_on_user_error()
def copy_command(
    name: Annotated[str, typer.Argument(help="Recipe, such as sft_then_dpo, or config, such as llama3.1-8b.")],
    path: Annotated[Path, typer.Argument(help="Folder to copy to.")] = Path(),
) -> None:
    """
    Copy a recipe and its config into a folder, to be edited.

    The config of a recipe is the one that it runs without --config. The recipe of a config is that of its launch line.
    """
    recipes = {file.stem: file for file in shipped("recipes").glob("*.py")}
    configs = {file.stem: file for file in shipped("recipes").glob("configs/*.yaml")}
    if name not in {*recipes, *configs}:
        raise HFTError(
            f"no recipe or config is named {name!r}: choose from the recipes {', '.join(sorted(recipes))} and the "
            f"configs {', '.join(sorted(configs))}."
        )
    recipe = re.findall(r"recipes/(\w+)\.py", configs[name].read_text("utf-8"))[0] if name in configs else name
    config = configs.get(name) or DEFAULTS.get(name)
    copies = {path / f"{recipe}.py": recipes[recipe]} | ({path / f"{name}.yaml": config} if config else {})
    for copy in copies:
        if copy.exists():
            raise HFTError(f"{str(copy)!r} exists, and no file is overwritten: give another folder, or remove it.")
    check_output("PATH", path)
    path.mkdir(parents=True, exist_ok=True)
    for copy, source in copies.items():
        shutil.copyfile(source, copy)
    typer.echo(f"Copied: {', '.join(map(str, copies))}")
    if config:
        typer.echo(f"Launch it with --config {path / name}.yaml, which the recipe does not read by itself.")
