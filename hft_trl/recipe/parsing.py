"""Parse the sections of a YAML file and dotted flags into dataclasses, with TRL's parser."""

import argparse
import copy
import dataclasses
import difflib
import os
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING
from enum import Enum
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import TrlParser
from trl.scripts.utils import DatasetConfig

from hft_trl.errors import HFTError, as_user_error
from hft_trl.files import load_yaml
from hft_trl.recipe.arguments import check_values

# Keys of sections and the names of the same settings in TRL's scripts, in both directions
OTHER_NAMES = {
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "split": "dataset_train_split",
    "eval_split": "dataset_test_split",
}
OTHER_NAMES |= {flat: name for name, flat in OTHER_NAMES.items()}
# Names in older versions of transformers and TRL, alignment-handbook, open-instruct, axolotl and LLaMA-Factory
OTHER_NAMES |= {
    **dict.fromkeys(("model_name", "base_model"), "model_name_or_path"),
    **dict.fromkeys(("torch_dtype", "model_dtype"), "dtype"),
    **dict.fromkeys(("flash_attention", "flash_attn", "use_flash_attn"), "attn_implementation"),
    **dict.fromkeys(("dataset_mixture", "dataset_mixer", "dataset_mixer_list"), "datasets"),
    **dict.fromkeys(("val_size", "val_set_size"), "test_split_size"),
    **dict.fromkeys(("cutoff_len", "max_seq_len", "max_seq_length", "sequence_len"), "max_length"),
    **dict.fromkeys(("batch_size", "micro_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("epochs", "num_epochs"), "num_train_epochs"),
    "evaluation_strategy": "eval_strategy",
    "finetuning_type": "method",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "preprocessing_num_workers": "dataset_num_proc",
    "sample_packing": "packing",
    "template": "chat_template",
}
NO_NAMES = {
    "resume_from_checkpoint": "a recipe resumes from the newest whole checkpoint of its output_dir, so drop it.",
    "stage": "the recipe and its sections say which stages are trained, so drop it.",
    "adapter": "HFT trains the model's own weights, so drop it.",
}

Keys = dict[str, tuple[type, dataclasses.Field]]  # of a section, with the dataclass of each
ON_BY_DEFAULT = ("assistant_only_loss", "logging_first_step", "enable_jit_checkpoint")  # in recipes, unlike in TRL
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # transformers' name, and its deprecated alias


def _print_help(text: str, known: Mapping[str, Keys]) -> NoReturn:
    """Print the text, the flags and their defaults, and exit."""
    layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=text.strip(), formatter_class=layout, add_help=False
    )
    groups: dict[str, Any] = {}
    for section, found in known.items():
        for name, (kind, field) in found.items() if "." not in section else ():
            title = f"{section or 'flags'} ({kind.__name__})"
            groups[title] = groups.get(title) or parser.add_argument_group(title)
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            default = name in ON_BY_DEFAULT or (default.value if isinstance(default, Enum) else default)
            stated = "required" if default is MISSING else f"default: {default}"
            groups[title].add_argument(
                f"--{_dotted(section, name)}",
                metavar=_shown(field.type),
                help=f"{field.metadata.get('help', '').partition('. ')[0]} ({stated})".replace("%", "%%"),
            )
    sys.stdout.write(parser.format_help())
    sys.exit(0)


def _shown(hint: Any) -> str:
    """Return a type as `--help` shows it."""
    kind, parts = get_origin(hint), [part for part in get_args(hint) if part is not NoneType]
    if kind is Literal:
        return f"{{{','.join(map(str, parts))}}}"
    return "|".join(_shown(part) for part in parts) if kind in (Union, UnionType) else (kind or hint).__name__


def taken(kind: type[Any], flat: Mapping[str, Any], prefix: str = "") -> Any:
    """Build a dataclass of the flags of its names, after a prefix."""
    return kind(**{field.name: flat[prefix + field.name] for field in dataclasses.fields(kind) if field.init})


def names_config(argv: list[str]) -> bool:
    """Return whether the command line has `--config`."""
    return any(token.partition("=")[0] == "--config" for token in argv)


def keys(types: Iterable[type], without: Collection[str] = ()) -> Keys:
    """Return the keys of a section that is parsed into the given dataclasses, those of this package first."""
    ours_first = sorted(types, key=lambda kind: not kind.__module__.startswith("hft_trl"))
    return {
        field.name: (kind, field)
        for kind in ours_first
        for field in dataclasses.fields(kind)
        if field.init and field.name not in {*without, *NO_NAMES}
    }


def read_sections(
    argv: list[str], default_config: str | Path | None, known: Mapping[str, Keys], help_text: str = ""
) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """
    Read the values of the YAML file and the tokens of the command line, both by section.

    `known` has the keys of each section, and under `""` those outside the sections. `env` sets environment variables.
    """
    if {"-h", "--help"} & set(argv):
        _print_help(help_text, known)
    path, sections = default_config, [name for name in known if name]
    flags: dict[str, list[str]] = {name: [] for name in known}
    current, tokens = "", iter(argv)
    for token in tokens:
        if not token.startswith("--"):
            flags[current].append(token)
            continue
        name, equals, value = token[2:].partition("=")
        if name == "config":
            path = value if equals else next(tokens, None)
            if path is None:
                raise HFTError("--config has no value: give the path of a YAML file.")
            continue
        current, _, key = name.rpartition(".")
        if name in sections:
            current, key = name, "model_name_or_path"
            if name != "model":
                raise HFTError(f"--{name} is a section: set a key of it, such as --{name}.{next(iter(known[name]))}.")
        elif current not in known:  # an unknown key
            current, key = "", name
        flags[current].append(f"--{key}{equals}{value}")

    values = load_yaml(path) if path is not None else {}
    variables = values.pop("env", None) or {}
    if not isinstance(variables, dict) or None in variables.values():
        raise HFTError(f"env of {path} is {variables!r}: write variables and their values below it, indented.")
    with as_user_error(f"env of {path}"):
        os.environ.update({str(key): str(value) for key, value in variables.items()})
    dicts = [str(key) for key in values if isinstance(values[key], dict) and key not in {*known, *known[""]}]
    foreign = [key for key in dicts if OTHER_NAMES.get(key) != "datasets"]
    if not names_config(argv):  # a copied recipe may have fewer stages than the file of its original
        values = {key: value for key, value in values.items() if key not in foreign}
    elif foreign:
        raise HFTError(
            f"config {str(path)!r} has the sections {', '.join(foreign)}, which this recipe does not have: run the "
            "recipe that the file is for."
        )
    nested: dict[str, dict[str, Any]] = {}
    for name in sections:  # a section before those in it, such as sft before sft.hft
        place, _, key = name.rpartition(".")
        section = (nested[place] if place else values).pop(key, None) or {}
        if name == "model" and isinstance(section, str):
            section = {"model_name_or_path": section}
        if not isinstance(section, dict):
            raise HFTError(f"section {name} of {path} is {section!r}: write its keys below it, indented.")
        nested[name] = dict(section)
    values = {"": values, **nested}
    named = {name: [flag for flag in flag_names(flags[name]) if not _turns_off(flag, known[name])] for name in known}
    _check_known({name: [*values[name], *named[name]] for name in known}, known)
    return values, flags


def leaves_checkpointing(values: dict[str, Any], flags: list[str]) -> bool:
    """Remove `activation_checkpointing: auto` and what it overrides. Return whether it applies."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in CHECKPOINTING:
        for no, how in (("", {"nargs": "?", "const": "true"}), ("no_", {"action": "store_const", "const": "false"})):
            parser.add_argument(f"--{no}{name}", f"--{no}{name}".replace("_", "-"), dest="way", **how)
    try:
        found, others = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise HFTError(f"{(error.argument_name or '').partition('/')[0]} takes no value: drop the value.") from error
    way = found.way or next((values[name] for name in CHECKPOINTING if name in values), None)
    if found.way or way == "auto":
        flags[:] = others if way == "auto" else [*others, f"--{CHECKPOINTING[0]}={way}"]
        for name in CHECKPOINTING:
            values.pop(name, None)
    return way == "auto"


def parse_section(
    section: str,
    types: tuple[type, ...],
    values: dict[str, Any],
    flags: list[str],
    fixed: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """
    Build the dataclasses of a section from the YAML's `values` and the `flags`, which take precedence.

    Their keys were checked by [`read_sections`]. `fixed` are values that the recipe sets.
    """
    prefix = f"{section}." if section else ""
    hints = {name: hint for kind in types for name, hint in get_type_hints(kind).items()}
    given = {*values, *flag_names(flags)}
    parser = TrlParser(types, allow_abbrev=False, exit_on_error=False, add_help=False)
    argv, raw = [], dict(fixed or {})
    for key, value in values.items():
        if isinstance(value, dict | list | None) and _accepts(hints[key], type(value)):
            raw[key] = copy.deepcopy(value)  # a trainer may change it, and the same values are parsed again
            raw[key] = _entries(f"{prefix}{key}", hints[key], raw[key]) if isinstance(value, list) else raw[key]
        elif isinstance(value, bool) and not _accepts(hints[key], bool):
            raise HFTError(f"{prefix}{key} is {value}: YAML reads a bare yes, no, on or off like this, so quote it.")
        elif isinstance(value, str | int | float):
            argv.append(f"--{key}={value}")  # argparse converts and checks it like a flag
        else:
            raise HFTError(f"{prefix}{key} is {value!r}: it takes {_shown(hints[key])}.")
    for field in (field for kind in types for field in dataclasses.fields(kind)):
        if field.default is field.default_factory is MISSING and field.name not in {*given, *(fixed or ())}:
            raise HFTError(f"{prefix}{field.name} is missing: set it in the file, or with --{prefix}{field.name}.")
    if "bf16" in hints and not {"bf16", "fp16"} & given:
        raw["bf16"] = is_torch_bf16_gpu_available()
    for key in {*ON_BY_DEFAULT} & hints.keys():
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
    for name, value in found.items():
        if isinstance(value, str) and value.startswith("~/"):  # not all texts: a hub id stays as it is
            found[name] = str(Path(value).expanduser())
    check_values(prefix, {name: found[name] for name in found if name in given})
    if "use_cpu" in found and not found["bf16"] and not torch.accelerator.is_available():
        # Without it, accelerate starts several CPU processes as separate runs. transformers rejects bf16 without it.
        found["use_cpu"] = True
    with as_user_error(section or "the arguments"), warnings.catch_warnings():
        # TRL still sets the deprecated name
        warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
        return tuple(taken(kind, found) for kind in types)


def flag_names(flags: list[str]) -> list[str]:
    """List the keys among the tokens of a section."""
    return [flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")]


def _turns_off(flag: str, known: Keys) -> bool:
    """Return whether a flag turns off what is on by default, such as `no_log_on_each_node`. Files have no such key."""
    key = flag.removeprefix("no_")
    return key != flag and key in known and (known[key][1].default is True or key in CHECKPOINTING)


def _check_known(given: Mapping[str, Iterable[str]], known: Mapping[str, Keys]) -> None:
    """Reject keys that their sections do not have, all at once, with the place or the name that was meant."""
    problems = []
    every = list(dict.fromkeys(name for names in known.values() for name in names))
    for section, key in ((section, str(key)) for section, found in given.items() for key in found):
        if key in known[section]:
            continue
        places: list[str] = []
        alone = key.rpartition(".")[2]
        names = alone, OTHER_NAMES.get(alone), alone.removeprefix("no_"), *difflib.get_close_matches(alone, every, n=1)
        for name in names:
            found = [section] if name in known[section] else [p for p in known if name in known[p] and "." not in p]
            places = places or [_dotted(place, name) for place in found]
        places = [f"{alone}, indented below {key.rpartition('.')[0]}:"] if not section and key in places else places
        hint = NO_NAMES.get(key) or (f"did you mean {' or '.join(places)}?" if places else "--help lists the keys.")
        problems.append(f"unknown key {_dotted(section, key)}: {hint}")
    if problems:
        raise HFTError(" ".join(problems))


def _dotted(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _entries(name: str, hint: Any, values: list[Any]) -> list[Any]:
    """Convert the numbers and texts of a list as those of a flag are converted. TRL converts mappings."""
    kind = next((get_args(part)[0] for part in (hint, *get_args(hint)) if get_origin(part) is list), None)
    if kind not in (str, float, DatasetConfig):
        return values
    types = {str, int, float, dict} if kind is DatasetConfig else {str, int, float}
    with as_user_error(name):
        if not {*map(type, values)} <= types:
            raise ValueError(f"each entry of {values} must be {_shown(kind)}")
        return [value if isinstance(value, dict) else kind(value) for value in values]


def _accepts(hint: Any, kind: type) -> bool:
    return kind in {get_origin(part) or part for part in (hint, *get_args(hint))}
