"""From a YAML file and the command line to the sections of a recipe: TRL's configs, HFT's settings, data sets."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, SFTConfig

from hft_trl import demo
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.evaluation import parse_suites
from hft_trl.recipe.arguments import (
    DataArguments,
    HFTArguments,
    ModelArguments,
    RunArguments,
    StageArguments,
)
from hft_trl.recipe.parsing import (
    answer_help,
    keys,
    leaves_checkpointing,
    names_config,
    parse_section,
    read_sections,
)
from hft_trl.recipe.stage import Stage, make_stage

SFT_WITHOUT = ("drop_equal_pairs", "reference_quantization")  # keys of preference data
OF_THE_RUN = ("output_dir", "trust_remote_code")  # keys of a trainer's arguments that all stages have in common
RUN_LEVEL = ("method",)  # keys of HFTConfig that stand above the sections


@dataclasses.dataclass
class Recipe:
    """
    A parsed run.

    Attributes:
        run ([`RunArguments`]): What belongs to the run as a whole.
        stages (`dict[str, Stage]`): Its stages by name, in order, each starting from the model of the one before.
    """

    run: RunArguments
    stages: dict[str, Stage]


def parse_recipe(
    argv: list[str],
    stages: Mapping[str, type[TrainingArguments]],
    default_config: str | Path | None = None,
    help_text: str = "",
) -> Recipe:
    """
    Parse `--config FILE` and dotted flags such as `--sft.learning_rate 1e-5` into a recipe; flags win over the file.

    Args:
        argv (`list[str]`):
            The command line without the program's name.
        stages (`Mapping[str, type[TrainingArguments]]`):
            The config of the TRL trainer of each stage, by name and in order, such as
            `{"sft": SFTConfig, "dpo": DPOConfig}`. Each name is a section of the file. Beside the fields of its config, a
            section has those of [`DataArguments`], those of TRL's mixture of data sets, and `hft` for settings of HFT
            that are this stage's own.
        default_config (`str` or `Path`, *optional*):
            The YAML file to use when there is no `--config`. The embedded demo's serves no other model.
        help_text (`str`, *optional*):
            What `--help` prints.

    Raises:
        [`HFTError`]: Naming the key, its section and the nearest valid key, or the value that doesn't fit.
    """
    answer_help(argv, help_text)
    values, flags = read_sections(argv, default_config, section_keys(stages))
    (model,) = parse_section("model", (ModelArguments,), values["model"], flags["model"])
    if not names_config(argv):
        check_defaults_model(values["model"], model, "recipes/configs/qwen3-4b.yaml")
    (run,) = parse_section("", (RunArguments,), values[""], flags[""])
    check_evaluation(run, model)
    (hft,) = parse_section("hft", (HFTConfig,), values["hft"], flags["hft"], without=RUN_LEVEL)
    parsed: dict[str, Stage] = {}
    first = model = dataclasses.replace(model, model_name_or_path=demo.model_path(model.model_name_or_path))
    for name, config in stages.items():
        auto_checkpointing = leaves_checkpointing(values[name], flags[name])
        mixture, data, args = parse_section(
            name,
            (DatasetMixtureConfig, DataArguments, config),
            values[name],
            flags[name],
            fixed={"output_dir": str(Path(run.output_dir) / name)},
            without=_without(config),
        )
        general = {key: value for key, value in dataclasses.asdict(hft).items() if key not in RUN_LEVEL}
        own = f"{name}.hft"
        (stage_hft,) = parse_section(own, (HFTConfig,), {**general, **values[own]}, flags[own], without=RUN_LEVEL)
        stage_hft = dataclasses.replace(stage_hft, method=data.method or run.method)
        base = first if model is not first else None
        stage = make_stage(name, model, data, args, stage_hft, mixture if mixture.datasets else None, base)
        parsed[name] = dataclasses.replace(stage, auto_checkpointing=auto_checkpointing)
        # The revision is the hub model's: the next stage starts from a folder.
        model = dataclasses.replace(model, model_name_or_path=args.output_dir, model_revision="main")
    return Recipe(run, parsed)


def section_keys(stages: Mapping[str, type[TrainingArguments]]) -> dict[str, list[str]]:
    """The keys of each section of a recipe's file; those of `""` stand above the sections."""
    hft = keys((HFTConfig,), RUN_LEVEL)
    known = {"": keys((RunArguments,)), "model": keys((ModelArguments,)), "hft": hft}
    for name, config in stages.items():
        known[name] = keys((DatasetMixtureConfig, DataArguments, config), _without(config))
        known[f"{name}.hft"] = hft
    return known


def _without(config: type[TrainingArguments]) -> tuple[str, ...]:
    return (*OF_THE_RUN, "streaming", *(SFT_WITHOUT if issubclass(config, SFTConfig) else ()))


def check_defaults_model(default: dict[str, Any], model: ModelArguments, example: str) -> None:
    """
    Check that the settings of the embedded demo, which apply without `--config`, do not train another model.

    Args:
        default (`dict[str, Any]`):
            The section `model` of the default file.
        model ([`ModelArguments`]):
            The model that is asked for.
        example (`str`):
            A file with settings for a model of usual size.

    Raises:
        [`HFTError`]: If the default file is for the model `demo`, and another one is asked for.
    """
    if default.get("model_name_or_path") == "demo" != model.model_name_or_path:
        raise HFTError(
            f"model is {model.model_name_or_path!r}, but without --config every setting is the embedded demo's, which is a toy: "
            f"give a file of settings, such as --config {example}."
        )


def check_evaluation(run: RunArguments, model: ModelArguments) -> None:
    """
    Check that what a run is to be evaluated with can be run on its models.

    Raises:
        [`HFTError`]: If there is no such suite, its harness is missing, or the models need code of their repository.
    """
    if run.evaluate:
        parse_suites(run.evaluate)
    if run.evaluate and model.trust_remote_code:
        raise HFTError(
            f"evaluate is {run.evaluate!r} and model.trust_remote_code is true, but evaluation runs no code of a model's "
            "repository: leave one of them out."
        )


def parse_stage(
    name: str, config: type[SFTConfig] | type[DPOConfig], argv: list[str], help_text: str = ""
) -> tuple[Stage, bool]:
    """
    Parse TRL's own flat style, `--config x.yaml --learning_rate 1e-5 --method hft`, into a single stage.

    Args:
        name (`str`):
            `"sft"` or `"dpo"`.
        config (`type`):
            [`~trl.SFTConfig`] or [`~trl.DPOConfig`].
        argv (`list[str]`):
            The command line without the program's name.
        help_text (`str`, *optional*):
            What `--help` prints.

    Returns:
        `tuple[Stage, bool]`: The stage, and whether to overwrite what its folder holds.

    Raises:
        [`HFTError`]: Naming the flag and the nearest valid one, or the value that doesn't fit.
    """
    answer_help(argv, help_text)
    types = (ScriptArguments, config, ModelConfig, DatasetMixtureConfig, HFTArguments, StageArguments)
    without = ("reference_quantization",) if name == "sft" else ()
    values, flags = read_sections(argv, None, {"": keys(types, without)})
    auto_checkpointing = leaves_checkpointing(values[""], flags[""])
    script, args, model, mixture, hft, extra = parse_section("", types, values[""], flags[""], without=without)
    if model.use_peft or model.load_in_4bit or model.load_in_8bit:
        raise HFTError("use_peft, load_in_4bit and load_in_8bit train adapters: drop them, or use TRL's own script.")
    if script.dataset_streaming or mixture.streaming:
        raise HFTError("streaming is on, but every row is checked before training: drop dataset_streaming.")
    if not (model.model_name_or_path and (script.dataset_name or mixture.datasets) and args.output_dir):
        if not args.output_dir:
            raise HFTError("output_dir is empty: give the folder of the model, such as --output_dir runs/mine.")
        missing = "model_name_or_path" if not model.model_name_or_path else "dataset_name"
        raise HFTError(f"{missing} is missing: set it, such as --{missing} demo.")
    data = DataArguments(
        dataset=script.dataset_name,
        dataset_config=script.dataset_config,
        split=script.dataset_train_split,
        eval_split=script.dataset_test_split if args.eval_strategy != "no" else None,
        drop_equal_pairs=extra.drop_equal_pairs,
        reference_quantization=extra.reference_quantization,
    )
    start = ModelArguments(
        model_name_or_path=model.model_name_or_path,
        model_revision=model.model_revision,
        dtype=model.dtype or "float32",
        attn_implementation=model.attn_implementation,
        trust_remote_code=args.trust_remote_code,
        chat_template=extra.chat_template,
    )
    stage = make_stage(name, start, data, args, hft.config(args.seed), mixture if mixture.datasets else None)
    stage.auto_checkpointing = auto_checkpointing
    return stage, extra.overwrite
