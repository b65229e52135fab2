"""Check and load references in 8 or 4 bits."""

import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig, PreTrainedModel
from trl import DPOConfig
from trl.trainer.utils import create_model_from_path

from hft_trl.backends.fsdp import sharded_by
from hft_trl.errors import HFTError


def check_quantizable(bits: str, args: DPOConfig) -> None:
    """Reject settings that a quantized reference does not support."""
    for name in ("sync_ref_model", "precompute_ref_log_probs"):
        if vars(args)[name]:
            raise HFTError(f"reference_quantization is {bits}, which {name} has no use for: drop one of the two.")
    backend = sharded_by(args)
    if backend is not None:
        raise HFTError(
            f"reference_quantization is {bits}, but {backend} can't shard a quantised reference: drop it, or use DDP."
        )


def load_quantized(model: str, bits: str, args: DPOConfig) -> PreTrainedModel:
    """Load a model in 8 bits (LLM.int8) or 4 bits (NF4). Head, embeddings and norms are not quantized."""
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    config = BitsAndBytesConfig(**({"load_in_8bit": True} if bits == "8bit" else four))
    given = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    place = {"": PartialState().device}
    return create_model_from_path(model, **{**given, "quantization_config": config, "device_map": place})
