"""
Supervised fine-tuning, then direct preference optimisation, with half of the model learning in each stage.

Without arguments it runs on a small embedded model and data set, in a few minutes on a CPU:

```bash
accelerate launch recipes/sft_then_dpo.py
```

The paper's run (the file's header says on which machine):

```bash
accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/sft_then_dpo.py --config recipes/configs/llama2-7b.yaml
```

Flags win over the file. Each is a key of a section:

```bash
accelerate launch recipes/sft_then_dpo.py --method fft                        # full fine-tuning in both stages
accelerate launch recipes/sft_then_dpo.py --sft.method fft --dpo.method hft   # HFT from an FFT initialisation
accelerate launch recipes/sft_then_dpo.py --hft.ratio 0.3 --sft.learning_rate 1e-5 --dpo.beta 0.05
```

Another model takes its settings from a file, since those without `--config` are the embedded model's:

```bash
accelerate launch recipes/sft_then_dpo.py --config recipes/configs/qwen3-4b.yaml --model Qwen/Qwen3-0.6B-Base --sft.dataset my_chats.jsonl --output_dir runs/mine
```

Above the sections stand `output_dir`, `method`, `overwrite` and `evaluate` (suites to run at the end, such as
`general,knowledge`). The sections are `model` (a hub id or folder, or the keys model_name_or_path, dtype,
attn_implementation, chat_template, ...), `hft` (the fields of HFTConfig), `sft` (those of trl.SFTConfig, and dataset,
split) and `dpo` (those of trl.DPOConfig, and dataset, split). The same command again continues where it stopped.
"""

import sys

from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache

from hft_trl import HFTDPOTrainer, HFTSFTTrainer, as_user_error, demo, exit_on_user_error
from hft_trl.evaluation import parse_suites
from hft_trl.evaluation.stages import evaluate_stages
from hft_trl.folder import finished, open_stages, settings
from hft_trl.planning.auto import settle_checkpointing
from hft_trl.recipe import Recipe, parse_recipe
from hft_trl.rehearsal import rehearse
from hft_trl.report import Report, environment, print_report, write_views
from hft_trl.stage import check_model, check_reference, load_data, load_reference, load_tokenizer, train_and_save


def main(recipe: Recipe) -> None:
    sft, dpo, base = recipe.sft, recipe.dpo, recipe.sft.model.model_name_or_path

    # Whatever can be wrong is found before anything is trained
    suites = parse_suites(recipe.run.evaluate) if recipe.run.evaluate else []
    check_model(sft)
    check_reference(dpo, base)
    sft_data, sft_eval = load_data(sft)
    dpo_data, dpo_eval = load_data(dpo)
    tokenizer = load_tokenizer(sft)
    rehearse(tokenizer, [(sft, sft_data, sft_eval), (dpo, dpo_data, dpo_eval)])
    settle_checkpointing(sft, dpo)
    open_stages([sft, dpo], recipe.run.overwrite)

    # SFT: a random half of the base model learns to answer
    if not finished(sft):
        with as_user_error("the SFT trainer"):
            trainer = HFTSFTTrainer(
                model=base,
                args=sft.args,
                train_dataset=sft_data,
                eval_dataset=sft_eval,
                processing_class=tokenizer,
                hft_config=sft.hft,
            )
        train_and_save(sft, trainer, len(sft_data), base)
        del trainer
        clear_device_cache(garbage_collection=True)  # room for the next stage's policy and reference

    # DPO: a fresh half of the SFT model learns to prefer; its reference is the SFT model, wholly frozen
    if not finished(dpo):
        with as_user_error("the DPO trainer"):
            trainer = HFTDPOTrainer(
                model=dpo.model.model_name_or_path,
                ref_model=load_reference(dpo),
                args=dpo.args,
                train_dataset=dpo_data,
                eval_dataset=dpo_eval,
                processing_class=load_tokenizer(dpo),
                hft_config=dpo.hft,
            )
        train_and_save(dpo, trainer, len(dpo_data), base)

    # What was learned, and what was forgotten: the embedded world comes with its own probes
    stages = {"sft": str(sft.folder), "dpo": str(dpo.folder)}
    scores, standard_errors, shown = evaluate_stages(sft.model, stages, suites)
    if PartialState().is_main_process:
        report = Report(
            stages=[finished(sft), finished(dpo)],
            evaluation=scores,
            standard_errors=standard_errors,
            suites=shown,
            base_model=base,
            command=sys.argv,
            settings={"sft": settings(sft), "dpo": settings(dpo)},
            num_processes=PartialState().num_processes,
            environment=environment(),
        )
        report.save(recipe.run.output_dir)
        report = Report.load(recipe.run.output_dir)  # every view shows what the file says
        write_views(report, recipe.run.output_dir)
        print_report(report)


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_recipe(sys.argv[1:], default_config=demo.RECIPE, help_text=__doc__))
