r"""
Run supervised fine-tuning with half of the model learning, with TRL's flags and YAML files.

```bash
accelerate launch recipes/sft.py --model_name_or_path demo --dataset_name demo --learning_rate 1e-3 \
    --max_steps 300 --max_length 96 --per_device_train_batch_size 32 --output_dir runs/sft
accelerate launch recipes/sft.py --config my_trl.yaml --learning_rate 1e-5 --method hft --ratio 0.5
```

The flags are those of TRL's ScriptArguments, SFTConfig and ModelConfig, of HFTConfig (its seed is --hft_seed), and
--chat_template, --overwrite and --retention_texts (also facts, prompts, every, max_rows). --dataset_name also takes a
folder or a .jsonl, .json or .parquet file. The same command again resumes a stopped run.
"""

import sys

from hft_trl import HFTSFTTrainer, ResumableMixin, as_user_error, exit_on_user_error
from hft_trl.recipe import Stage, parse_stage, prepare, report
from trl import SFTConfig


class ResumableSFTTrainer(ResumableMixin, HFTSFTTrainer):
    """A run that is killed or stopped ends in the same bytes."""


def main(stage: Stage, overwrite: bool) -> None:
    # Mistakes are found before anything is trained
    prepare([stage], overwrite)

    # Train a half of the model
    if not stage.finished():
        with as_user_error("the trainer"):
            trainer = ResumableSFTTrainer(
                model=stage.model.model_name_or_path,
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
        main(*parse_stage("sft", SFTConfig, sys.argv[1:], __doc__))
