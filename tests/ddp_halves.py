"""What a process of a DDP run does for the tests: DPO with the frozen half shared or not, whole in bfloat16 or NF4."""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from conftest import ultrafeedback_row
from datasets import Dataset
from leaving import leave
from training import dpo_trainer, losses

from hft_trl import HFTConfig, HFTDPOTrainer
from hft_trl.reference import memory


def main(base: Path, output: Path) -> None:
    rows = Dataset.from_list([ultrafeedback_row(number) for number in range(32)])
    found = {}
    for name, share, dtype, kind in (
        ("shared", True, None, None),
        ("unshared", False, None, None),
        ("shared in bfloat16", True, "bfloat16", None),
        ("unshared in bfloat16", False, "bfloat16", None),
        ("shared in nf4", True, None, "nf4"),
    ):
        hft = HFTConfig(share_reference=share, frozen_dtype=dtype, frozen_quantization=kind)
        settings = {"bf16": dtype is not None, "save_strategy": "steps", "save_steps": 2, "max_steps": 3}
        trainer = dpo_trainer(HFTDPOTrainer, base, rows, output / name, hft, **settings)
        trainer.train()
        trainer.save_model()
        if share:  # once more from the middle
            again = dpo_trainer(HFTDPOTrainer, base, rows, output / name / "again", hft, **settings)
            again.train(resume_from_checkpoint=output / name / "checkpoint-2")
            again.save_model()
        found[name] = {
            "losses": losses(trainer),
            "memory": memory(trainer.model, trainer.ref_model),
            "frozen": trainer.hft_selection.frozen,
            "processes": trainer.accelerator.num_processes,
        }
    (output / f"{PartialState().process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave()
