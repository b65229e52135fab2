"""Check the start model of a run before anything is downloaded, and load quantized references."""

from pathlib import Path

import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainingArguments
from transformers.utils import ADAPTER_CONFIG_NAME
from trl import DPOConfig
from trl.trainer.utils import create_model_from_path

from hft_trl.backends import zero
from hft_trl.backends.fsdp import sharded_by
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.planning.memory import DTYPES
from hft_trl.recipe.arguments import ModelArguments
from hft_trl.selection import find_units
from hft_trl.skeleton import build_on_meta, check_folder
from hft_trl.weights import check_not_rounded, check_readable, rounds, weight_files


def check_model(model: ModelArguments, args: TrainingArguments, hft: HFTConfig | None) -> None:
    """Check that a whole causal LM can be trained as launched. `hft` is `None` for an adapter."""
    trains_half = hft is not None and hft.method == "hft"
    folder = Path(model.model_name_or_path)
    check_folder(model.model_name_or_path)
    if folder.is_dir():
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            raise HFTError(
                f"model folder {str(folder)!r} is an adapter, no whole model: merge it into the model that it was "
                "trained on (load it with peft.AutoPeftModelForCausalLM, call merge_and_unload() and "
                "save_pretrained), and give that folder."
            )
        check_readable(weight_files(str(folder)).values())
    structure = build_on_meta(model.model_name_or_path, model.model_revision, model.trust_remote_code)
    if hft is not None:
        find_units(structure, hft.exclude if trains_half else ())
    if trains_half:
        _check_type(model.model_name_or_path, args, structure)


def _check_type(model: str, args: TrainingArguments, structure: PreTrainedModel) -> None:
    """Reject a type that rounds the saved weights. For a hub id, its config states their type."""
    dtype, remedy = DTYPES.get(args.model_init_kwargs["dtype"]), None  # None for "auto", the type of the files
    if args.deepspeed_plugin is not None and args.mixed_precision in ("bf16", "fp16"):
        dtype, remedy = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float16, zero.UNCAST
    if dtype is None:
        return
    if Path(model).is_dir():
        check_not_rounded(model, {name: dtype for name, _ in structure.named_parameters()}, remedy)
    elif rounds(structure.config.dtype, dtype):
        own, asked = (str(kind).removeprefix("torch.") for kind in (structure.config.dtype, dtype))
        raise HFTError(
            f"dtype {asked} rounds {model!r}, whose config says {own}, so the frozen half would not stay "
            f"bit-identical: {remedy or 'load the model with dtype float32'}, or save it in that dtype first."
        )


def check_quantizable(bits: str, args: DPOConfig) -> None:
    """Reject settings that a quantized reference does not support."""
    for name in ("sync_ref_model", "precompute_ref_log_probs"):
        if vars(args)[name]:
            raise HFTError(f"reference_quantization is {bits}, which {name} has no use for: drop one of the two.")
    backend = sharded_by(args)
    if backend is not None:
        raise HFTError(
            f"reference_quantization is {bits}, but {backend} cannot shard a quantised reference: drop it, or use DDP."
        )


def load_quantized(model: str, bits: str, args: DPOConfig) -> PreTrainedModel:
    """Load a model in 8 bits (LLM.int8) or 4 bits (NF4). Head, embeddings and norms are not quantized."""
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    config = BitsAndBytesConfig(**({"load_in_8bit": True} if bits == "8bit" else four))
    given = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    place = {"": PartialState().device}
    return create_model_from_path(model, **{**given, "quantization_config": config, "device_map": place})
