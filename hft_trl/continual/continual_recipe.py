"""Parse the command line of a continual run, and plan and prepare its rounds."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging
from trl import SFTConfig

from hft_trl import demo
from hft_trl.chat import most_tokens
from hft_trl.config import HFTConfig
from hft_trl.continual.continual_arguments import ADAPTERS, Adapter, ContinualArguments, LoRAArguments, check_installed
from hft_trl.continual.gem import check_gem
from hft_trl.continual.rounds import Round, plan_rounds
from hft_trl.continual.run_folder import check_plan, rows_file, write_plan
from hft_trl.continual.tasks import Row, Task, constant_score, read_benchmark, read_replay, read_tasks
from hft_trl.errors import HFTError
from hft_trl.files import write_json_once, writing
from hft_trl.processes import by_first_process
from hft_trl.recipe.activation_checkpointing import settle_checkpointing
from hft_trl.recipe.arguments import DataArguments, ModelArguments, RetentionArguments
from hft_trl.recipe.folder import lock, open_stages
from hft_trl.recipe.parsing import flag_names, keys, leaves_checkpointing, names_config, parse_section, read_sections
from hft_trl.recipe.recipe import OF_THE_RUN, RUN_LEVEL, check_defaults_model, check_evaluation
from hft_trl.recipe.rehearsal import check_fills_batch, rehearse
from hft_trl.weights import combined_digest

logger = logging.get_logger(__name__)

# Arguments of the trainer that a run's plan contains
NOTED = (
    *("seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("max_steps", "max_length"),
)
# Keys that one approach alone uses
USED_BY = {"replay_share": "replay", "gem_memory": "gem", "lora.o_lora_lambda": "o_lora"}
KEYS = {
    "": keys((ContinualArguments,)),
    "model": keys((ModelArguments,)),
    "hft": keys((HFTConfig,), RUN_LEVEL),
    "lora": keys((LoRAArguments,)),
    "retention": keys((RetentionArguments,)),
    "sft": keys((SFTConfig,), OF_THE_RUN),
}


@dataclasses.dataclass
class ContinualRecipe:
    run: ContinualArguments
    model: ModelArguments  # the base
    hft: HFTConfig  # settings of each round, unless it trains an adapter
    lora: LoRAArguments  # the adapter of the approaches lora and o_lora
    sft: dict[str, Any]  # section sft of the file
    sft_flags: list[str]  # section sft of the command line
    auto_checkpointing: bool  # whether the recipe chooses the activation checkpointing
    retention: RetentionArguments | None  # what to measure in every round of what the model keeps of the base

    def arguments(self, folder: str | Path, epochs: int) -> SFTConfig:
        """Build the trainer's arguments of a round. Epochs or `max_steps` in the settings override `epochs`."""
        fixed = {"output_dir": str(folder), "num_train_epochs": epochs, "assistant_only_loss": False}
        (args,) = parse_section("sft", (SFTConfig,), self.sft, self.sft_flags, fixed=fixed)
        if args.packing:
            raise HFTError("sft.packing is true, but rows of a task are not packed: drop it.")
        if args.assistant_only_loss:
            raise HFTError("sft.assistant_only_loss is true, but tasks have no chat form: drop it.")
        if args.eval_strategy != "no":
            raise HFTError("sft.eval_strategy is set, but tasks are scored after each round: drop it.")
        if self.run.approach == "gem":
            check_gem(args, self.hft)
        return args

    def tasks(self) -> tuple[list[Task], tuple[Row, ...]]:
        """Read and check the tasks, and the general rows for replay."""
        run, tasks, general = self.run, [], ()
        if run.benchmark is not None:
            folder = demo.TASKS if run.benchmark == "demo" else run.benchmark
            tasks, general = read_benchmark(folder), read_replay(folder) if run.approach == "replay" else ()
        if run.tasks is not None:
            tasks += read_tasks(run.tasks)
        names = [task.name for task in tasks]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise HFTError(f"two tasks have the name {repeated[0]!r}: give each a unique name.")
        check_installed([run.approach, *(task.metric for task in tasks)])
        if run.approach == "replay" and not general:
            logger.warning("replay mixes in earlier tasks alone: the benchmark has no folder Lima with train.json.")
        return tasks, general

    def rounds(self, tasks: Sequence[Task], general: Sequence[Row] = ()) -> list[Round]:
        """Plan the rounds, and write the rows that each trains on. All processes must call it."""
        run, output, rounds, contents = self.run, Path(self.run.output_dir), [], {}
        args, positions = self.arguments(output, 1), most_tokens(self.model.structure())
        limits = {"sft.max_length": args.max_length, "the model's positions are": positions}
        for name, limit in limits.items():
            if limit is not None and run.max_new_tokens >= limit:
                raise HFTError(f"max_new_tokens is {run.max_new_tokens} and {name} {limit}: leave room for prompts.")
        max_length = min(filter(None, limits.values()), default=None)
        if run.approach == "multitask" and args.num_train_epochs == self.arguments(output, 2).num_train_epochs:
            tasks = [dataclasses.replace(task, epochs=1) for task in tasks]  # the user has set epochs for all
        plans = plan_rounds(run.approach, tasks, general, run.replay_share, args.seed, run.gem_memory)
        measured = {"retention": self.retention, "first_folder": output / plans[0].name}
        for number, plan in enumerate(plans):
            rows = [row._asdict() for row in plan.rows]
            memory = [{"task": task, **row._asdict()} for task, kept in plan.memories.items() for row in kept]
            files = [rows_file(output, plan.name, rows), rows_file(output, plan.name, memory, "-memory")]
            contents |= dict(zip(files, (rows, memory), strict=True))
            args, model = self.arguments(output / plan.name, plan.epochs), self.model
            start = output / plan.start if plan.start is not None else None
            hft, adapter = self.hft, None
            if run.approach in ADAPTERS:
                hft, adapter = None, Adapter(self.lora, earlier=tuple(done.folder for done in rounds))
            elif start is None:  # each round starts from the base, with a half of its own
                hft = dataclasses.replace(hft, seed=hft.seed + number)
            if run.approach == "lora":  # the previous round's adapter is trained further, on the base
                adapter, start = Adapter(self.lora, start), None
            if start is not None:  # a folder has no revision
                model = dataclasses.replace(model, model_name_or_path=str(start), model_revision="main")
            base = None if model is self.model else self.model
            data, memory_file = DataArguments(str(files[0])), files[1] if memory else None
            planned = {**measured, "plan": plan, "max_length": max_length, "memory": memory_file, "adapter": adapter}
            rounds.append(Round(plan.name, model, data, args, hft, None, base, self.auto_checkpointing, **planned))

        def write() -> None:
            with writing(output):
                lock(output)
                for path, content in contents.items():
                    if content:
                        write_json_once(path, content)

        by_first_process(write)
        return rounds

    def plan(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Describe the run: its approach, its tasks, and the settings that its scores depend on."""
        run, args = self.run, self.arguments(self.run.output_dir, 1)
        settings = {
            **{key: value for key, value in args.to_dict().items() if key in NOTED},
            "epochs": [self.arguments(run.output_dir, task.epochs).num_train_epochs for task in tasks],
            "global_batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "dtype": self.model.dtype,
            "revision": self.model.model_revision,
            "max_new_tokens": run.max_new_tokens,
            "train_sets": combined_digest([task.train for task in tasks])[:16],
            "test_sets": combined_digest([task.test for task in tasks])[:16],
        }
        if run.approach in ADAPTERS:
            settings |= {f"lora.{key}": value for key, value in dataclasses.asdict(self.lora).items()}
        elif run.method == "hft":
            settings |= {f"hft.{key}": value for key, value in self.hft.selecting().items() if key != "method"}
        settings |= {"replay_share": run.replay_share, "gem_memory": run.gem_memory}
        return {
            "approach": run.approach,
            "method": None if run.approach in ADAPTERS else run.method,
            "model": demo.shown(self.model.model_name_or_path),
            "tasks": [task.name for task in tasks],
            "metrics": [task.metric for task in tasks],
            "constant_answer": [constant_score(task) for task in tasks],
            "settings": {key: v for key, v in settings.items() if USED_BY.get(key, run.approach) == run.approach},
        }


def prepare_rounds(recipe: ContinualRecipe) -> list[Round]:
    """Plan the rounds, check and rehearse them, and open their folders. All processes must call it."""
    run, (tasks, general) = recipe.run, recipe.tasks()
    plan = recipe.plan(tasks)
    if not run.overwrite:
        check_plan(run.output_dir, plan)
    rounds = recipe.rounds(tasks, general)
    for planned in rounds:
        check_fills_batch(planned, len(planned.plan.rows))
    first = rounds[0]
    first.check()
    first.load_data()
    rehearse([first])
    settle_checkpointing(*rounds)
    open_stages(rounds, run.overwrite)
    write_plan(run.output_dir, plan, rounds, run.overwrite)
    return rounds


def parse_continual(argv: list[str], default_config: str | Path | None = None, help_text: str = "") -> ContinualRecipe:
    """Parse `--config FILE` and dotted flags such as `--sft.learning_rate 1e-5`. Flags override the file."""
    values, flags = read_sections(argv, default_config, KEYS, help_text)
    given = [f"{section}.{name}".removeprefix(".") for section in flags for name in flag_names(flags[section])]
    (model,) = parse_section("model", (ModelArguments,), values["model"], flags["model"])
    if not names_config(argv):
        check_defaults_model(values["model"], model, "recipes/configs/trace-llama2-7b-chat.yaml")
        if "tasks" in given:
            values[""].pop("benchmark", None)
    (run,) = parse_section("", (ContinualArguments,), values[""], flags[""])
    check_evaluation("evaluate", run.evaluate, model)
    (hft,) = parse_section("hft", (HFTConfig,), values["hft"], flags["hft"])
    (lora,) = parse_section("lora", (LoRAArguments,), values["lora"], flags["lora"])
    (retention,) = parse_section("retention", (RetentionArguments,), values["retention"], flags["retention"])
    retention = retention.of_model(model)
    unused = "hft." if run.approach in ADAPTERS else "lora."
    if run.approach in ADAPTERS and run.method == "hft" and "method" in (*values[""], *given):
        raise HFTError(f"method is hft, but {run.approach} trains an adapter, no half of the model: drop it.")
    for name in given:  # a file may have the sections of all approaches
        if name.startswith(unused) or USED_BY.get(name, run.approach) != run.approach:
            raise HFTError(f"{name} is given, but {run.approach} does not use it: drop it.")
    model = dataclasses.replace(model, model_name_or_path=demo.model_path(model.model_name_or_path))
    hft = dataclasses.replace(hft, method=run.method)
    auto = leaves_checkpointing(values["sft"], flags["sft"])
    if auto and run.approach == "gem":
        raise HFTError("sft.activation_checkpointing is auto, which cannot plan gem: set it to true or false.")
    recipe = ContinualRecipe(run, model, hft, lora, values["sft"], flags["sft"], auto, retention)
    recipe.arguments(run.output_dir, 1)  # rejects mistakes in them now
    return recipe
