"""A model's structure without weights, built on the meta device from its config alone."""

import os
from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME

from hft_trl import demo
from hft_trl.backends.zero import whole_models
from hft_trl.errors import HFTError, first_line
from hft_trl.files import is_missing
from hft_trl.weights import weight_files

SHAPES = Path(__file__).parent / "shapes"
"""Configs of well-known models in folders `OWNER/NAME`, without weights or tokenizer, for use without a network."""


def shape_of(model: str) -> str:
    """Return the folder of a built-in shape, `demo` or `smollm2`, else the folder or hub id itself."""
    # For a name that is too long, os.path.isfile returns False, but Path.is_file raises
    if os.path.isfile(SHAPES / model / "config.json") and not Path(model).is_dir():  # noqa: PTH113
        return str(SHAPES / model)
    return demo.model_path(model)


def check_folder(model: str) -> None:
    """Reject a path that does not exist or cannot be read, a file, an adapter, and the folder of a run."""
    folder = Path(model)
    try:
        if is_missing(model):
            raise HFTError(f"model folder {model!r} does not exist: correct the path, or give a hub id.")
        if folder.is_file():
            raise HFTError(f"model folder {model!r} is a file: give the folder that holds the whole model.")
        is_adapter = (folder / ADAPTER_CONFIG_NAME).is_file()
        stages = [str(path.parent) for path in sorted(folder.glob("*/config.json"))]
        is_run = bool(stages) and not (folder / "config.json").is_file()
    except OSError as error:  # a name that is too long, a folder of another user
        raise HFTError(
            f"model folder {model!r} cannot be read ({error.strerror}): correct the path, or change its permissions."
        ) from error
    if is_adapter:
        raise HFTError(
            f"model folder {model!r} is an adapter, no whole model: merge it into the model that it was trained on "
            "(load it with peft.AutoPeftModelForCausalLM, call merge_and_unload() and save_pretrained), and give "
            "that folder."
        )
    if is_run:
        raise HFTError(f"model folder {model!r} is a run: give one of its models, {' or '.join(stages)}.")


def build_on_meta(model: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a causal LM on the meta device from its config. Quantized and other models are rejected."""
    check_folder(model)
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        fits = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__] if known else []
        own_code = "AutoModelForCausalLM" in (config.to_dict().get("auto_map") or {})
        # The class that the config names is loaded, even if its type has a causal LM
        wrong = [name for name in config.architectures or [] if name not in fits and not name.endswith("ForCausalLM")]
        quantized = config.to_dict().get("quantization_config")
        method = quantized.get("quant_method", "unknown") if quantized else None
    except Exception as error:  # config classes raise many types
        if "trust_remote_code" in str(error):
            raise HFTError(f"model {model!r} brings code of its own: set trust_remote_code to let it run.") from error
        raise HFTError(f"model {model!r} has no readable config: {first_line(error)}") from error
    if method is not None:
        raise HFTError(f"model {model!r} is quantized ({method}): give the full-precision model.")
    if wrong or not (known or own_code):
        name = wrong[0] if wrong else type(config).__name__
        raise HFTError(f"model {model!r} is a {name}, which is no causal LM: give a decoder-only language model.")
    try:
        with torch.device("meta"), whole_models():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # constructors raise many types, for a wrong config or a missing package
        raise HFTError(f"model {model!r} cannot be built from its config: {first_line(error)}") from error


def load(model: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a causal LM with its weights in their own type. What [`build_on_meta`] rejects is rejected."""
    build_on_meta(model, revision, trust_remote_code)
    weight_files(model, revision)
    kwargs = {"revision": revision or "main", "trust_remote_code": trust_remote_code, "dtype": "auto"}
    return AutoModelForCausalLM.from_pretrained(model, **kwargs)
