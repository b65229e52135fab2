"""
Continual learning: task after task, a fresh half of the model in every round, and what is left of the earlier tasks.

Without arguments it learns eight small tasks with a small embedded model, in a few minutes on a CPU:

```bash
accelerate launch recipes/continual.py
```

TRACE with the paper's order, epochs and hyper-parameters (the file's header says on which machine):

```bash
accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/continual.py --config recipes/configs/trace-llama2-7b-chat.yaml --benchmark data/LLM-CL-Benchmark_5000
```

Tasks of your own, with the embedded model, and with another one, whose settings have to come from a file:

```bash
accelerate launch recipes/continual.py --tasks my_tasks.yaml --output_dir runs/mine
accelerate launch recipes/continual.py --config recipes/configs/trace-llama2-7b-chat.yaml --model Qwen/Qwen3-0.6B --benchmark none --tasks my_tasks.yaml --output_dir runs/mine
```

Each approach with either method; flags win over the file:

```bash
accelerate launch recipes/continual.py --approach sequential --method fft --output_dir runs/fft
accelerate launch recipes/continual.py --approach replay --hft.reselect same --hft.ratio 0.3 --output_dir runs/replay
```

An adapter instead of the model's own weights, one for all rounds or (o_lora) a new one in each; it has no method:

```bash
accelerate launch recipes/continual.py --approach lora --lora.r 8 --output_dir runs/lora
```

Above the sections stand `output_dir`, `approach` (sequential, gem, replay, lora, o_lora, multitask, individual), `method`,
`benchmark`, `tasks`, `replay_share`, `gem_memory`, `max_new_tokens`, `eval_batch_size`, `overwrite` and `evaluate` (suites after the last
round). The sections are `model` and `hft`, as in sft_then_dpo.py, `lora` (fields of peft.LoraConfig) and `sft` (the fields of
trl.SFTConfig). The same command again continues where it stopped, also in the middle of a round.
"""

import sys
from functools import partial

from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from hft_trl import HFTSFTTrainer, as_user_error, demo, exit_on_user_error
from hft_trl.continual.answers import evaluate_tasks
from hft_trl.continual.gem import GEMTrainer
from hft_trl.continual.plan import check_plan, write_plan
from hft_trl.continual.recipe import ContinualRecipe, load_rounds, parse_continual
from hft_trl.continual.report import write_report
from hft_trl.continual.rounds import Round
from hft_trl.continual.scores import write_scores
from hft_trl.continual.tables import score_grid
from hft_trl.continual.text import check_tokenizer, encode
from hft_trl.evaluation import parse_suites
from hft_trl.recipe import Stage
from hft_trl.recipe.activation_checkpointing import settle_checkpointing
from hft_trl.recipe.evaluation import evaluate_stages
from hft_trl.recipe.folder import finished, open_stages
from hft_trl.recipe.rehearsal import rehearse
from hft_trl.report.tables import rich_table
from rich.console import Console


def main(recipe: ContinualRecipe) -> None:
    run, base = recipe.run, recipe.model

    # Whatever can be wrong is found before anything is trained
    suites = parse_suites(run.evaluate) if run.evaluate else []
    tasks, rounds = load_rounds(recipe)
    plan = recipe.plan(tasks)
    if not run.overwrite:
        check_plan(run.output_dir, plan)
    stages, longest = recipe.stages(rounds), recipe.longest_text()
    stages[0].check()
    tokenizer = stages[0].load_tokenizer()
    check_tokenizer(tokenizer)
    stages[0].train_dataset, _ = encode(rounds[0].rows, tokenizer, longest)
    rehearse([stages[0]], tokenizer)
    settle_checkpointing(*stages)
    open_stages(stages, run.overwrite)
    write_plan(run.output_dir, plan, stages, run.overwrite)

    # Round after round: learn, then answer the test sets of the tasks seen so far
    answered, probes = [], {}
    for number, (planned, stage) in enumerate(zip(rounds, stages, strict=True), 1):
        new = not stage.finished()
        if new:
            learn(stage, planned, longest)
            clear_device_cache(garbage_collection=True)  # room for the model that answers
        asked = {tasks[task].name: task for task in planned.evaluated}
        found = evaluate_tasks(
            stage.folder,
            [tasks[task] for task in planned.evaluated],
            run.max_new_tokens,
            longest,
            run.eval_batch_size,
            base.dtype,
            trust_remote_code=base.trust_remote_code,
            attn_implementation=base.attn_implementation,
        )
        answered.append({asked[name]: result for name, result in found.items()})
        if number == len(rounds) and run.approach != "individual":  # which has no model that learned all tasks
            probes, _, _ = evaluate_stages(base, {planned.name: str(stage.folder)}, suites)
        if PartialState().is_main_process and (new or number == len(rounds)):
            records = [finished(done) for done in stages[:number]]
            scores = write_scores(run.output_dir, plan, rounds[:number], answered, records, probes)

    if PartialState().is_main_process:
        write_report(run.output_dir)
        Console().print(rich_table(score_grid(scores)))


def learn(stage: Stage, planned: Round, longest: int | None) -> None:
    """Train a round: a half of the last round's model, or an adapter, learns the answers of a task."""
    tokenizer = stage.load_tokenizer()
    rows, truncated = encode(planned.rows, tokenizer, longest, stage.args.dataset_num_proc)
    with as_user_error(f"the trainer of {stage.name}"):
        if stage.adapter is not None:
            from hft_trl.continual.adapters import adapter_trainer  # needs peft

            trainer = adapter_trainer(stage, rows, tokenizer)
        else:
            memories = [encode(kept, tokenizer, longest)[0] for kept in planned.memories.values()]
            kind = partial(GEMTrainer, memories=memories) if memories else HFTSFTTrainer
            trainer = kind(
                model=stage.model.model_name_or_path,
                args=stage.args,
                train_dataset=rows,
                processing_class=tokenizer,
                hft_config=stage.hft,
            )
    stage.train(trainer, len(rows), truncated)
    trainer.accelerator.free_memory()


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_continual(sys.argv[1:], default_config=demo.CONTINUAL_RECIPE, help_text=__doc__))
