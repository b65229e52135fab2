"""
Direct preference optimisation with half of the policy learning, in TRL's own flat style: TRL's flags and YAML files, and HFT's.

```bash
accelerate launch recipes/dpo.py --model_name_or_path runs/sft --dataset_name demo --dataset_train_split train_prefs --output_dir runs/dpo
accelerate launch recipes/dpo.py --config my_trl.yaml --learning_rate 1e-5 --method hft --ratio 0.5
```

The flags are those of TRL's ScriptArguments, DPOConfig and ModelConfig, of HFTConfig (its seed is --hft_seed), and
--chat_template, --drop_equal_pairs, --reference_quantization (8bit or 4bit) and --overwrite. --dataset_name also takes a
folder or a .jsonl, .json or .parquet file. The same command again continues where it stopped.
"""

import sys

from accelerate import PartialState
from trl import DPOConfig

from hft_trl import HFTDPOTrainer, as_user_error, exit_on_user_error
from hft_trl.folder import finished, open_stages, settings
from hft_trl.planning.auto import settle_checkpointing
from hft_trl.recipe import Stage, parse_stage
from hft_trl.rehearsal import rehearse
from hft_trl.report import Report, environment, print_report, write_views
from hft_trl.stage import check_model, check_reference, load_data, load_reference, load_tokenizer, train_and_save


def main(stage: Stage, overwrite: bool) -> None:
    base = stage.model.model_name_or_path

    # Whatever can be wrong is found before anything is trained
    check_model(stage)
    check_reference(stage, base)
    train_data, eval_data = load_data(stage)
    tokenizer = load_tokenizer(stage)
    rehearse(tokenizer, [(stage, train_data, eval_data)])
    settle_checkpointing(stage)
    open_stages([stage], overwrite)

    # Train a half of the policy; its reference is the start model, wholly frozen
    if not finished(stage):
        with as_user_error("the trainer"):
            trainer = HFTDPOTrainer(
                model=base,
                ref_model=load_reference(stage),
                args=stage.args,
                train_dataset=train_data,
                eval_dataset=eval_data,
                processing_class=tokenizer,
                hft_config=stage.hft,
            )
        train_and_save(stage, trainer, len(train_data), base)

    # Report
    if PartialState().is_main_process:
        report = Report(
            stages=[finished(stage)],
            base_model=base,
            command=sys.argv,
            settings=settings(stage),
            num_processes=PartialState().num_processes,
            environment=environment(),
        )
        report.save(stage.folder)
        report = Report.load(stage.folder)  # every view shows what the file says
        write_views(report, stage.folder)
        print_report(report)


if __name__ == "__main__":
    with exit_on_user_error():
        main(*parse_stage("dpo", DPOConfig, sys.argv[1:], __doc__))
