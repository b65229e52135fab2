"""What a process of a DDP run does for the tests: a half chosen by gradients, and one of single elements."""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from conftest import tulu_row
from datasets import Dataset
from leaving import leave
from training import sft_trainer

from hft_trl import HFTConfig, HFTSFTTrainer

WANDA = HFTConfig(strategy="importance", importance="wanda", importance_order="least", source_texts="demo")
GRADIENT = HFTConfig(strategy="importance", importance="gradient_norm", calibration_samples=3)


def main(base: Path, output: Path) -> None:
    rows = Dataset.from_list([tulu_row(number) for number in range(32)])
    important = sft_trainer(HFTSFTTrainer, base, rows, output / "importance", GRADIENT)
    kept = sft_trainer(HFTSFTTrainer, base, rows, output / "wanda", WANDA)
    elements = sft_trainer(
        HFTSFTTrainer, base, rows, output / "element", HFTConfig(strategy="element"), weight_decay=0.1, max_steps=2
    )
    elements.train()
    elements.save_model()
    found = {
        "processes": elements.accelerator.num_processes,
        "importance": important.hft_selection.digest,
        "wanda": kept.hft_selection.digest,
    }
    (output / f"{PartialState().process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave()
