r"""
Run SFT, then DPO, with half of the model learning in each stage.

Without arguments it runs on a small embedded model and data set, in a few minutes on a CPU:

```bash
accelerate launch recipes/sft_then_dpo.py
```

The paper's run (the file's header says on which machine):

```bash
accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/sft_then_dpo.py \
    --config recipes/configs/llama2-7b.yaml
```

Flags override the file. Each is a key of a section:

```bash
accelerate launch recipes/sft_then_dpo.py --method fft                        # full fine-tuning in both stages
accelerate launch recipes/sft_then_dpo.py --sft.method fft --dpo.method hft   # HFT from an FFT initialisation
accelerate launch recipes/sft_then_dpo.py --hft.ratio 0.3 --sft.learning_rate 1e-5 --dpo.beta 0.05
```

For another model give a file, since the settings without `--config` are those of the embedded model:

```bash
accelerate launch recipes/sft_then_dpo.py --config recipes/configs/qwen3-4b.yaml --model Qwen/Qwen3-0.6B-Base \
    --sft.dataset my_chats.jsonl --output_dir runs/mine
```

Keys outside the sections are `output_dir`, `method`, `overwrite` and `evaluate` (suites to run at the end, such as
`general,knowledge`). The sections are `model` (a hub id or folder, or the keys model_name_or_path, dtype,
attn_implementation, chat_template, ...), `hft` (the fields of HFTConfig), `sft` (those of trl.SFTConfig, and dataset,
split) and `dpo` (those of trl.DPOConfig, and dataset, split). Instead of dataset a stage takes datasets (TRL's
mixture), and hft settings for this stage alone, such as --dpo.hft.ratio 0.3. The section `retention` (texts, facts,
prompts, every, max_rows) measures what every stage keeps of the base. The same command again resumes a stopped run.
"""

import sys

from accelerate.utils.memory import clear_device_cache
from hft_trl import HFTDPOTrainer, HFTSFTTrainer, ResumableMixin, as_user_error, demo, exit_on_user_error
from hft_trl.recipe import Recipe, parse_recipe, prepare, report
from trl import DPOConfig, SFTConfig


class ResumableSFTTrainer(ResumableMixin, HFTSFTTrainer):
    """A run that is killed or stopped ends in the same bytes."""


class ResumableDPOTrainer(ResumableMixin, HFTDPOTrainer):
    """A run that is killed or stopped ends in the same bytes."""


STAGES = {"sft": SFTConfig, "dpo": DPOConfig}  # each starts from the model of the one before


def main(recipe: Recipe) -> None:
    sft, dpo = stages = list(recipe.stages.values())

    # Mistakes are found before anything is trained
    prepare(stages, recipe.run.overwrite)

    # SFT: a random half of the base model learns to answer
    if not sft.finished():
        with as_user_error("the SFT trainer"):
            trainer = ResumableSFTTrainer(
                model=sft.model.model_name_or_path,
                args=sft.args,
                train_dataset=sft.train_dataset,
                eval_dataset=sft.eval_dataset,
                processing_class=sft.load_tokenizer(),
                hft_config=sft.hft,
            )
        sft.train(trainer)
        del trainer
        clear_device_cache(garbage_collection=True)  # room for the next stage's policy and reference

    # DPO: a fresh half of the SFT model learns to prefer; its reference is the SFT model, fully frozen
    if not dpo.finished():
        with as_user_error("the DPO trainer"):
            trainer = ResumableDPOTrainer(
                model=dpo.model.model_name_or_path,
                ref_model=dpo.load_reference(),
                args=dpo.args,
                train_dataset=dpo.train_dataset,
                eval_dataset=dpo.eval_dataset,
                processing_class=dpo.load_tokenizer(),
                hft_config=dpo.hft,
            )
        dpo.train(trainer)

    # Report what was learned and what was forgotten; the embedded model has its own probes
    report(stages, recipe.run)


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_recipe(sys.argv[1:], STAGES, default_config=demo.RECIPE, help_text=__doc__))
