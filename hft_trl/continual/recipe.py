"""The settings of a continual run, and its rounds as stages, which resume and are checked as all stages are."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging
from trl import SFTConfig

from hft_trl import demo
from hft_trl.chat import most_tokens
from hft_trl.config import HFTConfig
from hft_trl.continual.answers import check_lengths
from hft_trl.continual.arguments import ContinualArguments
from hft_trl.continual.gem import check_gem
from hft_trl.continual.metrics import check_metrics
from hft_trl.continual.plan import rows_file
from hft_trl.continual.rounds import ADAPTERS, Round, plan_rounds
from hft_trl.continual.tasks import Task, check_names, read_benchmark, read_replay, read_tasks
from hft_trl.errors import HFTError
from hft_trl.files import write_json_once, writing
from hft_trl.processes import by_first_process
from hft_trl.recipe.arguments import Adapter, DataArguments, LoRAArguments, ModelArguments
from hft_trl.recipe.locks import lock
from hft_trl.recipe.parsing import (
    answer_help,
    keys,
    leaves_checkpointing,
    names_config,
    parse_section,
    read_sections,
)
from hft_trl.recipe.recipe import OF_THE_RUN, RUN_LEVEL, check_defaults_model, check_evaluation
from hft_trl.recipe.stage import Stage, make_stage
from hft_trl.skeleton import build_on_meta

logger = logging.get_logger(__name__)

KEYS = {
    "": keys((ContinualArguments,)),
    "model": keys((ModelArguments,)),
    "hft": keys((HFTConfig,), RUN_LEVEL),
    "lora": keys((LoRAArguments,)),
    "sft": keys((SFTConfig,), OF_THE_RUN),
}


@dataclasses.dataclass
class ContinualRecipe:
    """
    A parsed continual run.

    Attributes:
        run ([`ContinualArguments`]): What belongs to the run as a whole.
        model ([`~hft_trl.recipe.arguments.ModelArguments`]): The base.
        hft ([`HFTConfig`]): What each round trains, unless that is an adapter.
        lora ([`~hft_trl.recipe.arguments.LoRAArguments`]): The adapter that `lora` and `o_lora` train.
        sft (`dict[str, Any]`), sft_flags (`list[str]`): The section `sft` of the file and of the command line.
        auto_checkpointing (`bool`): Whether the recipe decides how much the rounds compute again.
    """

    run: ContinualArguments
    model: ModelArguments
    hft: HFTConfig
    lora: LoRAArguments
    sft: dict[str, Any]
    sft_flags: list[str]
    auto_checkpointing: bool

    def arguments(self, folder: str | Path, epochs: int) -> SFTConfig:
        """
        The trainer's arguments of one round; epochs that the user set win, and `max_steps` does anyway.

        Raises:
            [`HFTError`]: Naming the key, or what continual learning has no use for.
        """
        (args,) = parse_section(
            "sft",
            (SFTConfig,),
            self.sft,
            self.sft_flags,
            fixed={"output_dir": str(folder), "num_train_epochs": epochs, "assistant_only_loss": False},
            without=OF_THE_RUN,
        )
        if args.packing:
            raise HFTError("sft.packing is true, but rows of a task are learned one by one: drop it.")
        if args.assistant_only_loss:
            raise HFTError("sft.assistant_only_loss is true, but tasks are learned in no chat form: drop it.")
        if args.eval_strategy != "no":
            raise HFTError("sft.eval_strategy is set, but tasks are scored after each round: drop it.")
        check_lengths(args.max_length, self.run.max_new_tokens)
        if self.run.approach == "gem":
            check_gem(args, self.hft)
        return args

    def stages(self, rounds: Sequence[Round]) -> list[Stage]:
        """
        The rounds as stages, each with the file of rows that it learns from. Every process has to call.

        Raises:
            [`HFTError`]: If the folder of the run can't be written, or the model can't have the adapter asked for.
        """
        output, stages, contents = Path(self.run.output_dir), [], {}
        for number, planned in enumerate(rounds):
            rows = [row._asdict() for row in planned.rows]
            memory = [{"task": task, **row._asdict()} for task, kept in planned.memories.items() for row in kept]
            files = [rows_file(output, planned.name, rows), rows_file(output, planned.name, memory, "-memory")]
            contents |= dict(zip(files, (rows, memory), strict=True))
            args, model = self.arguments(output / planned.name, planned.epochs), self.model
            start = output / planned.start if planned.start is not None else None
            hft, adapter = self.hft, None
            if self.run.approach in ADAPTERS:
                hft, adapter = None, Adapter(self.lora, earlier=tuple(stage.folder for stage in stages))
            elif start is None:  # each from the base, and each with a half of its own
                hft = dataclasses.replace(hft, seed=hft.seed + number)
            if self.run.approach == "lora":  # the last round's adapter goes on, on the base
                adapter, start = Adapter(self.lora, start), None
            if start is not None:  # the revision is the hub model's
                model = dataclasses.replace(model, model_name_or_path=str(start), model_revision="main")
            data, base = DataArguments(str(files[0])), None if model is self.model else self.model
            stage = make_stage(planned.name, model, data, args, hft, base=base, adapter=adapter)
            memory_file = files[1] if memory else None
            stages.append(dataclasses.replace(stage, memory=memory_file, auto_checkpointing=self.auto_checkpointing))
        by_first_process(partial(_write_rows, output, contents))
        if self.run.approach in ADAPTERS:
            _check_adapter(stages[0])
        return stages

    def longest_text(self) -> int | None:
        """
        Longest text that is learned, prompt and answer together, in tokens; `None` without any limit.

        Raises:
            [`HFTError`]: If answers leave no room for prompts in the model.
        """
        model = build_on_meta(self.model.model_name_or_path, self.model.model_revision, self.model.trust_remote_code)
        max_length = self.arguments(self.run.output_dir, 1).max_length
        return check_lengths(max_length, self.run.max_new_tokens, most_tokens(model))

    def plan(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """What the run is to do, and the settings that its scores depend on."""
        run, args = self.run, self.arguments(self.run.output_dir, 1)
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        chosen = ("seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm",
                  "max_steps", "max_length")  # fmt: skip
        settings = {
            **{key: value for key, value in args.to_dict().items() if key in chosen},
            "epochs": [self.arguments(run.output_dir, task.epochs).num_train_epochs for task in tasks],
            "global_batch_size": batch,
            "dtype": self.model.dtype,
            "revision": self.model.model_revision,
            "max_new_tokens": run.max_new_tokens,
            "train_sets": _digest([task.train for task in tasks]),
            "test_sets": _digest([task.test for task in tasks]),
        }
        if run.approach in ADAPTERS:
            used = dataclasses.asdict(self.lora)
            if run.approach == "lora":
                del used["o_lora_lambda"]  # there is no penalty
            settings |= {f"lora.{key}": value for key, value in used.items()}
        elif run.method == "hft":
            settings |= {f"hft.{key}": value for key, value in self.hft.selecting().items() if key != "method"}
        for approach, key in (("replay", "replay_share"), ("gem", "gem_memory")):
            if run.approach == approach:
                settings[key] = vars(run)[key]
        return {
            "approach": run.approach,
            "method": None if run.approach in ADAPTERS else run.method,
            "model": demo.shown(self.model.model_name_or_path),
            "tasks": [task.name for task in tasks],
            "metrics": [task.metric for task in tasks],
            "settings": settings,
        }


def parse_continual(argv: list[str], default_config: str | Path | None = None, help_text: str = "") -> ContinualRecipe:
    """
    Parse `--config FILE` and dotted flags such as `--sft.learning_rate 1e-5`; flags win over the file.

    Args:
        argv (`list[str]`):
            The command line without the program's name.
        default_config (`str` or `Path`, *optional*):
            The YAML file to use when there is no `--config`, but for its benchmark where the command line has `tasks`.
            The embedded demo's serves no other model.
        help_text (`str`, *optional*):
            What `--help` prints.

    Raises:
        [`HFTError`]: Naming the key, its section and the nearest valid key, or the value that doesn't fit.
    """
    answer_help(argv, help_text)
    values, flags = read_sections(argv, default_config, KEYS)
    (model,) = parse_section("model", (ModelArguments,), values["model"], flags["model"])
    if not names_config(argv):
        check_defaults_model(values["model"], model, "recipes/configs/trace-llama2-7b-chat.yaml")
        if _given("tasks", {}, flags[""]):
            values[""].pop("benchmark", None)
    (run,) = parse_section("", (ContinualArguments,), values[""], flags[""])
    check_evaluation(run, model)
    (hft,) = parse_section("hft", (HFTConfig,), values["hft"], flags["hft"], without=RUN_LEVEL)
    (lora,) = parse_section("lora", (LoRAArguments,), values["lora"], flags["lora"])
    if run.approach in ADAPTERS:
        if run.method == "hft" and _given("method", values[""], flags[""]):
            raise HFTError(f"method is hft, but {run.approach} trains an adapter, no half of the model: drop it.")
        _refuse("hft", flags, f"{run.approach} trains an adapter, no half of the model")
    else:
        _refuse("lora", flags, f"{run.approach} trains the model's own weights, no adapter")
    for section, key, approach in (
        ("", "replay_share", "replay"),
        ("", "gem_memory", "gem"),
        ("lora", "o_lora_lambda", "o_lora"),
    ):
        if run.approach != approach and _given(key, {}, flags[section]):
            raise HFTError(
                f"{section}{'.' * bool(section)}{key} is given, but {run.approach} has no use for it: drop it."
            )
    model = dataclasses.replace(model, model_name_or_path=demo.model_path(model.model_name_or_path))
    auto = leaves_checkpointing(values["sft"], flags["sft"])
    recipe = ContinualRecipe(
        run, model, dataclasses.replace(hft, method=run.method), lora, values["sft"], flags["sft"], auto
    )
    recipe.arguments(run.output_dir, 1)  # a mistake in them is found now
    return recipe


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _write_rows(output: Path, files: dict[Path, list[dict[str, str]]]) -> None:
    with writing(output):
        lock(output)
        for path, rows in files.items():
            if rows:
                write_json_once(path, rows)


def _given(key: str, values: dict[str, Any], flags: list[str]) -> bool:
    return key in values or any(flag[2:].partition("=")[0].replace("-", "_") == key for flag in flags)


def _refuse(section: str, flags: dict[str, list[str]], why: str) -> None:
    """Refuse a flag of a section that the approach has no use for. A file may have it: it is there for all approaches."""
    if flags[section]:
        key = flags[section][0][2:].partition("=")[0]
        raise HFTError(f"{section}.{key} is given, but {why}: drop it.")


def _check_adapter(stage: Stage) -> None:
    try:
        from hft_trl.continual.adapters import check_adapter
    except ImportError as error:
        raise HFTError(f"adapters need {error.name}: run pip install -c constraints.txt -e '.[continual]'.") from error
    check_adapter(stage)


def _write_demo(folder: Path) -> None:
    from hft_trl.continual.demo_tasks import write_benchmark

    with writing(folder):
        lock(folder.parent)
        write_benchmark(folder)


def load_rounds(recipe: ContinualRecipe) -> tuple[list[Task], list[Round]]:
    """
    Read and check every task of a run, and plan its rounds. Every process has to call.

    Raises:
        [`HFTError`]: Naming the folder, file, row or key that is missing, or the library that a metric needs.
    """
    run, tasks = recipe.run, []
    folder = run.benchmark
    if folder == "demo":
        folder = str(Path(run.output_dir) / "benchmark")
        by_first_process(partial(_write_demo, Path(folder)))
    if folder is not None:
        tasks += read_benchmark(folder)
    if run.tasks is not None:
        tasks += read_tasks(run.tasks)
    check_names(tasks)
    check_metrics([task.metric for task in tasks])
    general = read_replay(folder) if folder is not None and run.approach == "replay" else ()
    if run.approach == "replay" and not general:
        logger.warning("replay mixes in earlier tasks alone: the benchmark has no folder Lima with train.json.")
    seed = recipe.arguments(run.output_dir, 1).seed
    return tasks, plan_rounds(run.approach, tasks, general, run.replay_share, seed, run.gem_memory)
