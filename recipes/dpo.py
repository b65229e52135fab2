r"""
Run DPO with half of the policy learning, with TRL's flags and YAML files.

```bash
accelerate launch recipes/dpo.py --model_name_or_path runs/sft --dataset_name demo --dataset_train_split train_prefs \
    --learning_rate 3e-5 --max_steps 60 --max_length 96 --per_device_train_batch_size 32 --output_dir runs/dpo
accelerate launch recipes/dpo.py --config my_trl.yaml --learning_rate 1e-5 --method hft --ratio 0.5
```

The flags are those of TRL's ScriptArguments, DPOConfig and ModelConfig, of HFTConfig (its seed is --hft_seed), and
--chat_template, --drop_equal_pairs, --reference_quantization (8bit or 4bit), --overwrite and --retention_texts (also
facts, prompts, every, max_rows). --dataset_name also takes a folder or a .jsonl, .json or .parquet file. The same
command again resumes a stopped run.
"""

import sys

from hft_trl import HFTDPOTrainer, ResumableMixin, as_user_error, exit_on_user_error
from hft_trl.recipe import Stage, parse_stage, prepare, report
from trl import DPOConfig


class ResumableDPOTrainer(ResumableMixin, HFTDPOTrainer):
    """A run that is killed or stopped ends in the same bytes."""


def main(stage: Stage, overwrite: bool) -> None:
    # Mistakes are found before anything is trained
    prepare([stage], overwrite)

    # Train a half of the policy; its reference is the start model, fully frozen
    if not stage.finished():
        with as_user_error("the trainer"):
            trainer = ResumableDPOTrainer(
                model=stage.model.model_name_or_path,
                ref_model=stage.load_reference(),
                args=stage.args,
                train_dataset=stage.train_dataset,
                eval_dataset=stage.eval_dataset,
                processing_class=stage.load_tokenizer(),
                hft_config=stage.hft,
            )
        stage.train(trainer)

    report([stage])


if __name__ == "__main__":
    with exit_on_user_error():
        main(*parse_stage("dpo", DPOConfig, sys.argv[1:], __doc__))
