r"""
Learn one task after another, a new half in every round, and measure forgetting.

Without arguments it learns eight small tasks with a small embedded model, in a few minutes on a CPU:

```bash
accelerate launch recipes/continual.py
```

TRACE with the paper's order, epochs and hyper-parameters (the file's header names the machine):

```bash
accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/continual.py \
    --config recipes/configs/trace-llama2-7b-chat.yaml --benchmark data/LLM-CL-Benchmark_5000
```

Tasks of your own, with the embedded model, or with another one, whose settings have to come from a file:

```bash
accelerate launch recipes/continual.py --tasks my_tasks.yaml --output_dir runs/mine
accelerate launch recipes/continual.py --config recipes/configs/trace-llama2-7b-chat.yaml --model Qwen/Qwen3-0.6B \
    --benchmark none --tasks my_tasks.yaml --output_dir runs/mine
```

Other approaches and methods. Flags override the file. Adapters have no method:

```bash
accelerate launch recipes/continual.py --approach sequential --method fft --output_dir runs/fft
accelerate launch recipes/continual.py --approach replay --hft.reselect same --hft.ratio 0.3 --output_dir runs/replay
accelerate launch recipes/continual.py --approach lora --lora.r 8 --output_dir runs/lora
```

Keys outside the sections: `output_dir`, `approach` (sequential, gem, replay, lora, o_lora, multitask, individual),
`method`, `benchmark`, `tasks`, `replay_share`, `gem_memory`, `max_new_tokens`, `eval_batch_size`, `overwrite` and
`evaluate` (suites to run after the last round). Sections: `model`, `hft` and `retention` as in sft_then_dpo.py, `lora`
(fields of peft.LoraConfig) and `sft` (fields of trl.SFTConfig). The same command resumes a run that was stopped, also
in the middle of a round.
"""

import sys

from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from hft_trl import HFTSFTTrainer, ResumableMixin, as_user_error, demo, exit_on_user_error
from hft_trl.continual.continual_recipe import ContinualRecipe, parse_continual, prepare_rounds
from hft_trl.continual.gem import GEMTrainer
from hft_trl.continual.report import print_scores, write_report
from hft_trl.continual.rounds import Round
from hft_trl.continual.run_folder import write_scores
from hft_trl.evaluation import parse_suites
from hft_trl.recipe.evaluation import evaluate_stages


class ResumableSFTTrainer(ResumableMixin, HFTSFTTrainer):
    """A run that is killed or stopped ends in the same bytes."""


def main(recipe: ContinualRecipe) -> None:
    run = recipe.run

    # All mistakes are found before anything is trained
    suites = parse_suites(run.evaluate) if run.evaluate else []
    rounds = prepare_rounds(recipe)

    # Each round learns a task, then answers the test sets of the tasks seen so far
    answered, probes = [], {}
    for number, current in enumerate(rounds, 1):
        new, last = not current.finished(), number == len(rounds)
        if new:
            train(current)
            clear_device_cache(garbage_collection=True)  # room for the model that answers
        answered.append(current.evaluate(run.max_new_tokens, run.eval_batch_size))
        if last and run.approach != "individual":  # which has no model that learned all tasks
            probes, _, _ = evaluate_stages(recipe.model, {current.name: str(current.folder)}, suites)
        if PartialState().is_main_process and (new or last):
            write_scores(run.output_dir, rounds[:number], answered, probes)

    if PartialState().is_main_process:
        write_report(run.output_dir)
        print_scores(run.output_dir)


def train(current: Round) -> None:
    """Train a fresh half of the previous round's model, or an adapter, on the rows of a round."""
    current.load_data()
    with as_user_error(f"the trainer of {current.name}"):
        if current.adapter is not None:
            from hft_trl.continual.adapters import AdapterTrainer, OLoRATrainer  # needs peft

            trainer_class = OLoRATrainer if current.adapter.earlier else AdapterTrainer
            own = {"adapter": current.adapter}
        elif current.memories:
            trainer_class, own = GEMTrainer, {"hft_config": current.hft, "memories": current.memories}
        else:
            trainer_class, own = ResumableSFTTrainer, {"hft_config": current.hft}
        trainer = trainer_class(
            model=current.model.model_name_or_path,
            args=current.args,
            train_dataset=current.train_dataset,
            processing_class=current.load_tokenizer(),
            **own,
        )
    current.train(trainer)
    trainer.accelerator.free_memory()


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_continual(sys.argv[1:], default_config=demo.CONTINUAL_RECIPE, help_text=__doc__))
