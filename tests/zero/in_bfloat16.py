"""
Trains a few steps in bf16 under DeepSpeed: `accelerate launch --mixed_precision bf16 in_bfloat16.py FLOAT32 BFLOAT16
OUT`.

FLOAT32 and BFLOAT16 are folders of a base model in that type. Every process writes what it saw into OUT.
"""

import json
import sys
from pathlib import Path

import deepspeed.ops
from datasets import Dataset
from trl import DPOConfig, SFTConfig

sys.path.append(str(Path(__file__).parent.parent))
from leaving import leave

from hft_trl import HFTConfig, HFTDPOTrainer, HFTError, HFTSFTTrainer

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see watched.py

ROWS = [{"prompt": f"Where does {n} live?", "chosen": f" In city {n}.", "rejected": " Who knows?"} for n in range(8)]


def refused(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except HFTError as error:
        return str(error)
    return ""


def main(float32: str, bfloat16: str, out: Path) -> None:
    pairs = Dataset.from_list(ROWS)
    texts = pairs.map(lambda row: {"completion": row["chosen"]}).select_columns(["prompt", "completion"])
    settings = {
        "use_cpu": True,
        "bf16": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "model_init_kwargs": {"dtype": "float32"},  # what the recipes ask for where nothing else is said
    }
    seen = {}

    sft = SFTConfig(str(out / "sft"), **settings)
    seen["rounded"] = refused(HFTSFTTrainer, model=float32, args=sft, train_dataset=texts)
    half = HFTConfig(frozen_dtype="bfloat16")
    seen["frozen_dtype"] = refused(HFTSFTTrainer, model=bfloat16, args=sft, train_dataset=texts, hft_config=half)
    trainer = HFTSFTTrainer(model=bfloat16, args=sft, train_dataset=texts)
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()  # only the first process writes
    seen["sft"] = {"log": trainer.state.log_history, "moments": moments(trainer)}

    dpo = DPOConfig(str(out / "dpo"), **settings)
    half = HFTConfig(strategy="importance")  # needs the weights, which ZeRO-3 has divided
    trainer = HFTDPOTrainer(model=str(out / "sft"), args=dpo, train_dataset=pairs, hft_config=half)
    trainer.train()
    trainer.save_model()
    seen["dpo"] = {"log": trainer.state.log_history, "moments": moments(trainer)}
    (out / f"{trainer.args.process_index}.json").write_text(json.dumps(seen))


def moments(trainer) -> dict[str, int]:
    """Elements of Adam's first moment that this process holds, by their type."""
    elements: dict[str, int] = {}
    for entry in trainer.optimizer.state.values():
        moment = entry["exp_avg"]
        elements[str(moment.dtype)] = elements.get(str(moment.dtype), 0) + moment.numel()
    return elements


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    leave()
