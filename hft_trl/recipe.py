"""From a YAML file and the command line to the sections of a recipe: TRL's configs, HFT's settings, data sets."""

import argparse
import dataclasses
import difflib
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers.utils import is_torch_bf16_gpu_available
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from hft_trl import demo
from hft_trl.arguments import DataArguments, HFTArguments, ModelArguments, RunArguments, StageArguments
from hft_trl.backends import check_frozen_dtype
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError

SECTIONS = {
    "model": "model_name_or_path",
    "hft": "ratio",
    "sft": "learning_rate",
    "dpo": "beta",
}  # with a key as example

PREFERENCE_ONLY = ("drop_equal_pairs", "reference_quantization")  # keys that a stage of SFT does not have


class _Parser(TrlParser):
    """TRL's parser, whose errors can be caught."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


@dataclasses.dataclass
class Stage:
    """
    One stage of training.

    Attributes:
        name (`str`): `"sft"` or `"dpo"`.
        model ([`ModelArguments`]): What it starts from.
        data ([`DataArguments`]): What it learns from.
        args ([`~trl.SFTConfig`] or [`~trl.DPOConfig`]): The trainer's arguments.
        hft ([`HFTConfig`]): What to train.
        mixture ([`~trl.DatasetMixtureConfig`], *optional*): TRL's mixture of data sets, instead of `data.dataset`.
    """

    name: str
    model: ModelArguments
    data: DataArguments
    args: SFTConfig | DPOConfig
    hft: HFTConfig
    mixture: DatasetMixtureConfig | None = None

    @property
    def folder(self) -> Path:
        """Where the stage's model is saved."""
        return Path(self.args.output_dir)


@dataclasses.dataclass
class Recipe:
    """A parsed run: its stages in order, each starting from the one before."""

    run: RunArguments
    sft: Stage
    dpo: Stage


def parse_recipe(argv: list[str], default_config: str | Path | None = None, help_text: str = "") -> Recipe:
    """
    Parse `--config FILE` and dotted flags such as `--sft.learning_rate 1e-5` into a recipe; flags win over the file.

    Args:
        argv (`list[str]`):
            The command line without the program's name.
        default_config (`str` or `Path`, *optional*):
            The YAML file to use when there is no `--config`.
        help_text (`str`, *optional*):
            What `--help` prints.

    Raises:
        [`HFTError`]: Naming the key, its section and the nearest valid key, or the value that doesn't fit.
    """
    _answer_help(argv, help_text)
    values, flags = _read(argv, default_config, SECTIONS)
    (run,) = _parse("", (RunArguments,), values[""], flags[""])
    (model,) = _parse("model", (ModelArguments,), values["model"], flags["model"])
    if run.evaluate and model.trust_remote_code:
        raise HFTError(
            f"evaluate is {run.evaluate!r} and model.trust_remote_code is true, but evaluation runs no code of a model's "
            "repository: leave one of them out."
        )
    (hft,) = _parse("hft", (HFTConfig,), values["hft"], flags["hft"], without={"method"})
    stages = {}
    for name, config in (("sft", SFTConfig), ("dpo", DPOConfig)):
        data, args = _parse(
            name,
            (DataArguments, config),
            values[name],
            flags[name],
            fixed={"output_dir": str(Path(run.output_dir) / name)},
            without={"output_dir", "trust_remote_code", *(PREFERENCE_ONLY if name == "sft" else ())},
        )
        stages[name] = _stage(name, model, data, args, dataclasses.replace(hft, method=data.method or run.method))
        # The revision is the hub model's: the next stage starts from a folder.
        model = dataclasses.replace(model, model_name_or_path=args.output_dir, model_revision="main")
    return Recipe(run, **stages)


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
    _answer_help(argv, help_text)
    values, flags = _read(argv, None, ())
    types = (ScriptArguments, config, ModelConfig, DatasetMixtureConfig, HFTArguments, StageArguments)
    without = ("reference_quantization",) if name == "sft" else ()
    script, args, model, mixture, hft, extra = _parse("", types, values[""], flags[""], without=without)
    if model.use_peft or model.load_in_4bit or model.load_in_8bit:
        raise HFTError("use_peft, load_in_4bit and load_in_8bit train adapters: drop them, or use TRL's own script.")
    if script.dataset_streaming or mixture.streaming:
        raise HFTError("streaming is on, but every row is checked before training: drop dataset_streaming.")
    if not (model.model_name_or_path and (script.dataset_name or mixture.datasets) and args.output_dir):
        missing = "model_name_or_path" if not model.model_name_or_path else "dataset_name"
        raise HFTError(f"{missing} is missing: set it, such as --{missing} demo.")
    data = DataArguments(
        dataset=script.dataset_name or "a mixture",
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
    stage = _stage(name, start, data, args, hft.config(args.seed), mixture if mixture.datasets else None)
    return stage, extra.overwrite


def _stage(
    name: str,
    model: ModelArguments,
    data: DataArguments,
    args: SFTConfig | DPOConfig,
    hft: HFTConfig,
    mixture: DatasetMixtureConfig | None = None,
) -> Stage:
    if hft.frozen_dtype and hft.method == "hft":
        check_frozen_dtype(
            args, hft.frozen_dtype
        )  # here, so that a later stage's mistake is found before the first trains
    if args.resume_from_checkpoint is not None:
        raise HFTError(
            f"resume_from_checkpoint is {args.resume_from_checkpoint!r}, but a recipe goes on from the newest whole checkpoint of "
            "its output_dir by itself: drop it. To go on from an older one, move the newer ones away."
        )
    if model.model_name_or_path == "demo":
        model = dataclasses.replace(model, model_name_or_path=str(demo.MODEL))
    if data.dataset == "demo":
        data = dataclasses.replace(data, dataset=str(demo.SFT_DATA if name == "sft" else demo.DPO_DATA))
    args.trust_remote_code = model.trust_remote_code
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **(args.model_init_kwargs or {}),
    }
    # Counted by the trainer itself and kept over a resume.
    if args.include_num_input_tokens_seen == "no":
        args.include_num_input_tokens_seen = "non_padding"
    return Stage(name, model, data, args, hft, mixture)


def _answer_help(argv: list[str], text: str) -> None:
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(text.strip() + "\n")
        sys.exit(0)


def _read(
    argv: list[str], default_config: str | Path | None, sections: Iterable[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """The YAML file's values and the command line's tokens, both by section; `""` is what stands above the sections."""
    path = default_config
    flags: dict[str, list[str]] = {name: [] for name in ("", *sections)}
    current = ""
    tokens = iter(argv)
    for token in tokens:
        if not token.startswith("--"):
            flags[current].append(token)
            continue
        name, equals, value = token[2:].partition("=")
        if name == "config":
            path = value if equals else next(tokens, None)
            if path is None:
                raise HFTError("--config is the last word: give it the path of a YAML file.")
            continue
        current, dot, key = name.partition(".")
        if name in sections:
            current, key = name, "model_name_or_path"
            if name != "model":
                raise HFTError(f"--{name} is a section: set one of its keys, such as --{name}.{SECTIONS[name]}.")
        elif not dot:
            current, key = "", name
        elif current not in sections:
            raise HFTError(f"unknown section {current!r} in {token}: {_nearest(current, sections)}")
        flags[current].append(f"--{key}{equals}{value}")

    values = _load_yaml(path) if path is not None else {}
    nested = {name: values.pop(name, None) or {} for name in sections}
    if isinstance(nested.get("model"), str):
        nested["model"] = {"model_name_or_path": nested["model"]}
    for name, section in nested.items():
        if not isinstance(section, dict):
            raise HFTError(f"section {name} of {path} is {section!r}: write its keys below it, indented.")
    return {"": values, **nested}, flags


def _load_yaml(path: str | Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise HFTError(f"config {str(path)!r} can't be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise HFTError(f"config {str(path)!r} is no valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise HFTError(f"config {str(path)!r} must hold keys and values.")
    for key, value in (values.pop("env", None) or {}).items():
        os.environ[str(key)] = str(value)
    return values


def _parse(
    section: str,
    types: tuple[type, ...],
    values: dict[str, Any],
    flags: list[str],
    fixed: dict[str, Any] | None = None,
    without: Iterable[str] = (),
) -> tuple[Any, ...]:
    """Build the dataclasses of one section from the YAML's `values` and the command line's `flags`, which win."""
    prefix = f"{section}." if section else ""
    hints = {name: hint for kind in types for name, hint in get_type_hints(kind).items()}
    known = [
        field.name for kind in types for field in dataclasses.fields(kind) if field.init and field.name not in without
    ]
    switches = [f"no_{name}" for name in known if hints[name] in (bool, bool | None)]
    given = [flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")]
    for key in (*values, *given):
        if key not in known and not (key in given and key in switches):
            where = f"in section {section}" if section else "above the sections"
            raise HFTError(f"unknown key {prefix}{key} {where}: {_nearest(str(key), known, prefix)}")

    parser = _Parser(types, allow_abbrev=False, exit_on_error=False, add_help=False)
    argv, raw = [], dict(fixed or {})
    for key, value in values.items():
        if isinstance(value, dict | list | None) and _accepts(hints[key], type(value)):
            raw[key] = value
        elif isinstance(value, bool) and not _accepts(hints[key], bool):
            raise HFTError(f"{prefix}{key} is {value}: YAML reads a bare yes, no, on or off like this, so quote it.")
        elif isinstance(value, str | int | float):
            argv.append(f"--{key}={value}")  # through argparse, which converts and checks it like a flag
        else:
            raise HFTError(f"{prefix}{key} is {value!r}: it takes {_readable(hints[key])}.")
    if "bf16" in known and not {"bf16", "fp16", "no_bf16"} & {*values, *given}:
        raw["bf16"] = is_torch_bf16_gpu_available()
    # Defaults of the recipes where neither TRL's file nor the user says otherwise; raw values may still be overridden.
    for key in {"assistant_only_loss", "logging_first_step", "enable_jit_checkpoint"} & {*known}:
        raw.setdefault(key, True)
    parser.set_defaults_with_config(**raw)
    try:
        namespace, rest = parser.parse_known_args([*argv, *flags])
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").partition("/")[0].lstrip("-")
        raise HFTError(f"{prefix}{name}: {error.message}.") from error
    if rest:
        raise HFTError(f"{' '.join(rest)!r} belongs to no flag: write --{prefix or 'section.'}key value.")
    found = vars(namespace)
    if found.get("bf16") and not found.get("use_cpu") and not is_torch_bf16_gpu_available():
        raise HFTError(
            f"{prefix}bf16 is true, but this machine has no bfloat16 GPU: set {prefix}bf16 to false, or {prefix}use_cpu to true."
        )
    if found.get("fp16") and not torch.cuda.is_available():
        raise HFTError(f"{prefix}fp16 is true, but this machine has no GPU: set {prefix}fp16 to false.")
    if "use_cpu" in found and not torch.accelerator.is_available():
        # Said outright, since accelerate otherwise runs several CPU processes as so many separate runs.
        found["use_cpu"] = True
    try:
        with warnings.catch_warnings():
            # transformers renames it to activation_checkpointing; TRL still sets the old name for everybody.
            warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
            return tuple(
                kind(**{field.name: found[field.name] for field in dataclasses.fields(kind) if field.init})
                for kind in types
            )
    except HFTError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise HFTError(f"{section or 'settings'}: {' '.join(str(error).split())}") from error


def _accepts(hint: Any, kind: type) -> bool:
    return kind in {get_origin(part) or part for part in (hint, *get_args(hint))}


def _readable(hint: Any) -> str:
    return str(hint).replace("typing.", "").replace("<class '", "").replace("'>", "")


def _nearest(key: str, known: Iterable[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{matches[0]}?" if matches else f"the valid ones are {', '.join(sorted(known))}."
