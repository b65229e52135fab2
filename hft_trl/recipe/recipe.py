"""Parse the command line of a recipe, prepare its stages, and report their results."""

import dataclasses
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, SFTConfig

from hft_trl import demo
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.evaluation import parse_suites
from hft_trl.recipe.activation_checkpointing import settle_checkpointing
from hft_trl.recipe.arguments import DataArguments, ModelArguments, RetentionArguments, RunArguments, StageArguments
from hft_trl.recipe.evaluation import evaluate_stages, sample_stages
from hft_trl.recipe.folder import finished, open_stages, settings
from hft_trl.recipe.parsing import Keys, keys, leaves_checkpointing, names_config, parse_section, read_sections, taken
from hft_trl.recipe.rehearsal import rehearse
from hft_trl.recipe.stage import Stage
from hft_trl.report import Report, environment, print_report, write_views
from hft_trl.report.record import HISTORY, retention_of
from hft_trl.report.views import PAGE_FILE

OF_THE_RUN = ("output_dir", "trust_remote_code")  # arguments of a trainer that are the same in all stages
RUN_LEVEL = ("method",)  # fields of HFTConfig that are set outside the section hft


@dataclasses.dataclass
class Recipe:
    """Store a parsed run."""

    run: RunArguments
    stages: dict[str, Stage]  # by name, in order; each starts from the model of the previous one
    sections: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the recipe's own, by name


def parse_recipe(
    argv: list[str],
    stages: Mapping[str, type[TrainingArguments]],
    default_config: str | Path | None = None,
    help_text: str = "",
    sections: Mapping[str, type] = MappingProxyType({}),
) -> Recipe:
    """
    Parse `--config FILE` and dotted flags such as `--sft.learning_rate 1e-5`. Flags override the file.

    `stages` has the config of each stage's TRL trainer by name, in order, and `sections` the dataclasses of the
    recipe's own sections. `default_config` is used without `--config`.
    """
    check_names(stages)
    known = section_keys(stages) | {name: keys((kind,)) for name, kind in sections.items()}
    values, flags = read_sections(argv, default_config, known, help_text)
    (model,) = parse_section("model", (ModelArguments,), values["model"], flags["model"])
    if not names_config(argv):
        example = "qwen3-4b" if "dpo" in stages else "frontier-smollm2"
        check_defaults_model(values["model"], model, f"recipes/configs/{example}.yaml")
    (run,) = parse_section("", (RunArguments,), values[""], flags[""])
    check_evaluation("evaluate", run.evaluate, model)
    (hft,) = parse_section("hft", (HFTConfig,), values["hft"], flags["hft"])
    (retention,) = parse_section("retention", (RetentionArguments,), values["retention"], flags["retention"])
    parsed: dict[str, Stage] = {}
    start = model
    first = model = dataclasses.replace(model, model_name_or_path=demo.model_path(model.model_name_or_path))
    for name, config in stages.items():
        auto_checkpointing = leaves_checkpointing(values[name], flags[name])
        mixture, data, args = parse_section(
            name,
            (DatasetMixtureConfig, DataArguments, config),
            values[name],
            flags[name],
            fixed={"output_dir": str(Path(run.output_dir) / name)},
        )
        general = {key: value for key, value in dataclasses.asdict(hft).items() if key not in RUN_LEVEL}
        place = f"{name}.hft"
        (stage_hft,) = parse_section(place, (HFTConfig,), {**general, **values[place]}, flags[place])
        stage_hft = dataclasses.replace(stage_hft, method=data.method or run.method)
        base = first if model is not first else None
        mixture = mixture if mixture.datasets else None
        parsed[name] = Stage(
            name, model, data, args, stage_hft, mixture, base,
            auto_checkpointing=auto_checkpointing,
            retention=retention.of_model(start),
            first_folder=Path(run.output_dir) / next(iter(stages)),
        )  # fmt: skip
        # The next stage starts from a folder, which has no revision
        model = dataclasses.replace(model, model_name_or_path=args.output_dir, model_revision="main")
    own = {name: parse_section(name, (kind,), values[name], flags[name])[0] for name, kind in sections.items()}
    return Recipe(run, parsed, own)


def check_names(stages: Iterable[str]) -> None:
    """Reject stage names that a section, a key outside the sections or a report already uses."""
    others = {"model", "hft", "retention", "env", "data", "base", HISTORY, "prompt", *keys((RunArguments,))}
    if wrong := [name for name in stages if not name or name in others or not {".", "/", "="}.isdisjoint(name)]:
        raise HFTError(
            f"STAGES has a stage named {wrong[0]!r}: give it another name, without dots and slashes, and none of "
            f"{', '.join(sorted(others))}."
        )


def section_keys(stages: Mapping[str, type[TrainingArguments]]) -> dict[str, Keys]:
    """List the keys of each section of a recipe's file. Those of `""` are outside the sections."""
    hft = keys((HFTConfig,), RUN_LEVEL)
    known = {"": keys((RunArguments,)), "hft": hft, "model": keys((ModelArguments,))}
    known["retention"] = keys((RetentionArguments,))
    for name, config in stages.items():
        without = [*OF_THE_RUN, "streaming"]
        if issubclass(config, SFTConfig):
            without.append("drop_equal_pairs")
        if "precompute_ref_log_probs" not in keys((config,)):  # a trainer that takes no reference
            without.append("reference_quantization")
        known[name] = keys((DatasetMixtureConfig, DataArguments, config), without)
        known[f"{name}.hft"] = hft
    return known


def check_defaults_model(default: dict[str, Any], model: ModelArguments, example: str) -> None:
    """Reject another model with the embedded demo's settings, and name the file `example` instead."""
    if default.get("model_name_or_path") == "demo" != model.model_name_or_path:
        raise HFTError(
            f"model is {model.model_name_or_path!r}, but without --config every setting is the embedded demo's, which "
            f"is a toy: give a file of settings, such as --config {example}."
        )


def check_evaluation(setting: str, suites: str | None, model: ModelArguments) -> None:
    """Check that the suites of a setting exist, are installed, and can be run on the model."""
    if suites and parse_suites(suites) and model.trust_remote_code:
        raise HFTError(
            f"{setting} is {suites!r} and model.trust_remote_code is true, but evaluation runs no code of a "
            "model's repository: leave one of them out."
        )


def parse_stage(
    name: str, config: type[SFTConfig] | type[DPOConfig], argv: list[str], help_text: str = ""
) -> tuple[Stage, bool]:
    """Parse flags as those of TRL's scripts. Return the stage `name`, and whether to overwrite its folder."""
    types = (ScriptArguments, config, ModelConfig, DatasetMixtureConfig, StageArguments)
    known = {"": keys(types, ("reference_quantization",) if name == "sft" else ())}
    values, flags = read_sections(argv, None, known, help_text)
    auto_checkpointing = leaves_checkpointing(values[""], flags[""])
    script, args, model, mixture, extra = parse_section("", types, values[""], flags[""])
    if model.use_peft or model.load_in_4bit or model.load_in_8bit:
        raise HFTError("use_peft, load_in_4bit and load_in_8bit train adapters: drop them, or use TRL's own script.")
    if script.dataset_streaming or mixture.streaming:
        raise HFTError("streaming is on, but every row is checked before training: drop dataset_streaming.")
    data_given = script.dataset_name or mixture.datasets
    for required, given in (("model_name_or_path", model.model_name_or_path), ("dataset_name", data_given)):
        if not given:
            raise HFTError(f"{required} is missing: set it, such as --{required} demo.")
    flat = {**vars(script), **vars(model), **vars(extra), **vars(args), "method": None}
    flat |= {"dataset": script.dataset_name, "split": script.dataset_train_split}
    flat["eval_split"] = script.dataset_test_split if args.eval_strategy != "no" else None
    start, data = taken(ModelArguments, flat), taken(DataArguments, flat)
    hft = taken(
        HFTConfig, flat | {"method": extra.method, "seed": args.seed if extra.hft_seed is None else extra.hft_seed}
    )
    retention = taken(RetentionArguments, flat, "retention_").of_model(start)
    mixture = mixture if mixture.datasets else None
    stage = Stage(name, start, data, args, hft, mixture, auto_checkpointing=auto_checkpointing, retention=retention)
    return stage, extra.overwrite


def prepare(stages: Sequence[Stage], overwrite: bool = False) -> None:
    """Check and rehearse all stages, load their data, and open their folders. All processes must call it."""
    for stage in stages:
        stage.check()
    for stage in stages:
        stage.load_data()
    rehearse(stages)
    settle_checkpointing(*stages)
    open_stages(stages, overwrite)


def report(stages: Sequence[Stage], run: RunArguments | None = None) -> None:
    """Evaluate the models, and write and print the report. All processes must call it."""
    start, folder = stages[0].model, run.output_dir if run is not None else str(stages[0].folder)
    models = {stage.name: str(stage.folder) for stage in stages}
    suites = parse_suites(run.evaluate) if run is not None and run.evaluate else []
    scores, errors, shown = evaluate_stages(start, models, suites)
    if not PartialState().is_main_process:
        return
    records = [finished(stage) for stage in stages]
    Report(
        stages=records,
        evaluation=scores,
        standard_errors=errors,
        suites=shown,
        samples=sample_stages(start, models, next((s.eval_dataset for s in stages if s.eval_dataset), None)),
        retention=retention_of(records),
        base_model=start.model_name_or_path,
        command=sys.argv,
        settings=settings(stages[0]) if run is None else {stage.name: settings(stage) for stage in stages},
        num_processes=PartialState().num_processes,
        environment=environment(),
    ).save(folder)
    read = Report.load(folder)  # all views show the file's content
    write_views(read, folder)
    print_report(read)
    # The last stage's own start: one earlier would differ where earlier stages learned
    compared = shlex.join([demo.shown(stages[-1].model.address), str(stages[-1].folder)])
    sys.stdout.write(f"report: {Path(folder) / PAGE_FILE}\nnext: hft-trl diff {compared}\n")
