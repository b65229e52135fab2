"""
Bytes that the parts of a preference stage take, with what saves them.

```bash
python benchmarks/memory.py                     # a Llama of 26 million parameters
python benchmarks/memory.py --hidden 1024 --layers 8
```

Every variant trains two steps of DPO on the embedded pairs, in float32 or under bfloat16 autocast, and is read off the
trainer: the policy's weights, what the reference takes beside them, the most gradients at once, and the optimizer's
state.
"""

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig

from hft_trl import HFTConfig, HFTDPOTrainer, demo
from hft_trl.chat import load_tokenizer
from hft_trl.frozen.quantized_linear import QuantizedLinear
from hft_trl.recipe.loading import load_quantized, load_split
from hft_trl.recipe.rows import preference_dataset
from hft_trl.reference import memory

VARIANTS = {
    "FFT": {"method": "fft"},
    "HFT, reference of its own": {"share_reference": False},
    "HFT": {},
    "HFT, frozen_dtype bfloat16": {"frozen_dtype": "bfloat16"},
    "HFT, frozen_quantization int8": {"frozen_quantization": "int8"},
    "HFT, frozen_quantization nf4": {"frozen_quantization": "nf4"},
    "HFT, reference in 8 bits": {"reference": "8bit"},
    "HFT, reference in 4 bits": {"reference": "4bit"},
    "HFT, optim adamw_bnb_8bit": {"optim": "adamw_bnb_8bit"},
    "HFT, frozen_dtype bfloat16 and adamw_bnb_8bit": {"frozen_dtype": "bfloat16", "optim": "adamw_bnb_8bit"},
    "HFT, optimizer_in_backward": {"optimizer_in_backward": True},
    "HFT, nf4, adamw_bnb_8bit and in_backward": {
        "frozen_quantization": "nf4",
        "optim": "adamw_bnb_8bit",
        "optimizer_in_backward": True,
    },
}


def measure(base: Path, settings: dict[str, str | bool]) -> list[int]:
    """Bytes of policy, reference, gradients and optimizer state."""
    settings = dict(settings)
    bits, optim = settings.pop("reference", None), settings.pop("optim", "adamw_torch")
    args = DPOConfig(
        str(base / "out"), use_cpu=True, bf16="frozen_dtype" in settings, max_steps=2, per_device_train_batch_size=2,
        max_length=64, optim=optim, max_grad_norm=0, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = HFTDPOTrainer(
        model=str(base),
        ref_model=load_quantized(str(base), bits, args) if bits else None,
        args=args,
        train_dataset=preference_dataset(load_split(str(demo.DPO_DATA), "train_prefs[:16]"), "pairs"),
        processing_class=load_tokenizer(str(demo.MODEL)),
        hft_config=HFTConfig(**settings),
    )
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    gradients = [0]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(
            lambda _: gradients.append(sum(p.grad.nbytes for p in trained if p.grad is not None))
        )
    trainer.train()
    state = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    scales = sum(module.scale.nbytes for module in trainer.model.modules() if isinstance(module, QuantizedLinear))
    policy = sum(parameter.nbytes for parameter in trainer.model.parameters()) + scales
    beside = memory(trainer.model, trainer.ref_model)[0]
    return [policy, beside, max(gradients), sum(v.nbytes for v in state if hasattr(v, "nbytes"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 64 (512)")
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    if options.hidden < 64 or options.hidden % 64:
        parser.error(f"--hidden {options.hidden}: it must be a multiple of 64, which is the size of a head")
    if options.layers < 1:
        parser.error(f"--layers {options.layers}: it must be at least 1")
    table = Table("variant", *("policy", "reference, beside it", "gradients", "optimizer state", "total"))
    with tempfile.TemporaryDirectory() as folder:
        size = {"hidden_size": options.hidden, "intermediate_size": options.hidden * 8 // 3 // 64 * 64}
        heads = {"num_attention_heads": options.hidden // 64, "num_hidden_layers": options.layers}
        LlamaForCausalLM(LlamaConfig(vocab_size=768, **size, **heads)).save_pretrained(folder)
        for name, settings in VARIANTS.items():
            parts = measure(Path(folder), settings)
            table.add_row(name, *(f"{part / 1e6:,.1f} MB" for part in (*parts, sum(parts))))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
