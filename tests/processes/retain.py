"""Trainings with a RetentionCallback, as a program: `accelerate launch ... retain.py BASE OUTPUT`."""

import json
import os
import sys
from pathlib import Path

import fsdp_on_cpu
import torch
from accelerate import PartialState
from datasets import Dataset
from trl import DPOConfig, SFTConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import tulu_row, ultrafeedback_row
from leaving import leave
from training import ResumableDPOTrainer, ResumableSFTTrainer

from hft_trl import HFTConfig, RetentionCallback
from hft_trl.chat import load_tokenizer
from hft_trl.recipe.rows import preference_dataset, sft_dataset
from hft_trl.retention.meter import BASE_FILE

ROWS = {
    "texts": [f"Person {number} lives in city {number % 7}." for number in range(9)],
    "facts": [{"text": f"City {n} is", "answer": "large", "others": ["small", "far away"]} for n in range(7)],
    "prompts": [{"prompt": f"Where does person {n} live?"} for n in range(5)],
}
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": True,
    "logging_steps": 1,
    "save_steps": 2,
    "max_steps": 4,
    "learning_rate": 1e-3,
}


def train(name: str, base: Path, output: Path, **settings) -> list[dict]:
    """Train a stage, the second against the base of the first, and return its log rows."""
    sft = name.startswith("sft")
    settings = {**SETTINGS, **settings, "per_device_train_batch_size": 8 // int(os.environ.get("WORLD_SIZE", "1"))}
    rows = Dataset.from_list([(tulu_row if sft else ultrafeedback_row)(number) for number in range(32)])
    config, kind = (SFTConfig, ResumableSFTTrainer) if sft else (DPOConfig, ResumableDPOTrainer)
    prepare = sft_dataset if sft else preference_dataset
    trainer = kind(
        model=str(base),
        args=config(str(output / name), **settings),
        train_dataset=prepare(rows, "rows"),
        eval_dataset=prepare(rows.select(range(8)), "rows") if "eval_strategy" in settings else None,
        processing_class=load_tokenizer(str(base), "tulu"),
        callbacks=[RetentionCallback(**ROWS, every=2, base=None if sft else output / "sft" / BASE_FILE)],
        hft_config=HFTConfig(),
    )
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


def main(base: str, output: str) -> None:
    fsdp_on_cpu.enable()
    PartialState()  # joins the other processes
    for name, start in (("sft", Path(base)), ("dpo", Path(output) / "sft")):
        log = train(name, start, Path(output))
        (Path(output) / name / f"seen-{PartialState().process_index}.json").write_text(json.dumps(log))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    leave()
