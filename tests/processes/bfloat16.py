"""
A bfloat16 model trained in bf16 under FSDP2: SFT, SFT resumed from its first step, and DPO of what SFT saved.

`accelerate launch ... bfloat16.py BASE OUTPUT`, where BASE holds a tokenizer.
"""

import json
import os
import sys
from pathlib import Path

import fsdp_on_cpu
import torch
from accelerate import PartialState
from replicated import VOCABULARY, leave, tiny_llama, trainer_of


def main(base: Path, output: Path) -> None:
    fsdp_on_cpu.enable()
    rank = PartialState(cpu=True).process_index  # joins the other process
    if rank == 0:
        tiny_llama(VOCABULARY).bfloat16().save_pretrained(output / "start")
    PartialState().wait_for_everyone()
    settings = {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}, "save_strategy": "steps", "save_steps": 1}
    losses = {}
    for kind in ("FULL", "SHARDED"):
        os.environ["FSDP_STATE_DICT_TYPE"] = f"{kind}_STATE_DICT"
        sft = output / f"{kind}-sft"
        for stage, start, folder, checkpoint in (
            ("sft", output / "start", sft, None),
            ("sft", output / "start", output / f"{kind}-resumed", str(sft / "checkpoint-1")),
            ("dpo", sft, output / f"{kind}-dpo", None),
        ):
            trainer = trainer_of(stage, str(start), base, folder, {}, {**settings, "learning_rate": 1e-3})
            trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_model()
            losses[folder.name] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    (output / f"losses-{rank}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
    leave()
