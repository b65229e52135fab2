"""
Prints the bytes that building a DPO trainer takes at its peak, shared and unshared:

in a process without other tests.
"""

import gc
import sys
from pathlib import Path

from conftest import ultrafeedback_row
from datasets import Dataset
from training import dpo_trainer

from hft_trl import HFTConfig, HFTDPOTrainer
from hft_trl.recipe.measure import peak_memory, reset_peak_memory


def main(small: Path, big: Path) -> None:
    rows = Dataset.from_list([ultrafeedback_row(number) for number in range(8)])
    dpo_trainer(HFTDPOTrainer, small, rows, big / "out")  # libraries and caches
    peaks = []
    for share in (True, False):
        gc.collect()
        reset_peak_memory()
        before = peak_memory()
        trainer = dpo_trainer(HFTDPOTrainer, big, rows, big / "out", HFTConfig(share_reference=share))
        peaks.append(peak_memory() - before)
        del trainer
    sys.stdout.write(f"\n{peaks[0]} {peaks[1]}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
