"""A plan as files: the recipe's YAML and the line that launches it."""

import json
import re
import shlex
from pathlib import Path

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.files import replacing, resolved, write_text, writing
from hft_trl.planning.fit import Plan
from hft_trl.planning.show import checkpointing
from hft_trl.planning.task import Task

RECIPE, LAUNCH = "recipe.yaml", "launch.sh"
DATA = {
    "sft": "  dataset: allenai/tulu-v2-sft-mixture\n  split: train\n",
    "dpo": "  dataset: HuggingFaceH4/ultrafeedback_binarized\n  split: train_prefs\n  drop_equal_pairs: true\n",
}
DEMO = {"sft": "  dataset: demo\n  split: train\n", "dpo": "  dataset: demo\n  split: train_prefs\n"}
SCHEDULE = {
    "sft": "  num_train_epochs: 2\n  learning_rate: 2.0e-5\n  lr_scheduler_type: linear\n  warmup_steps: 0.03 # share of all steps\n",
    "dpo": "  num_train_epochs: 1\n  learning_rate: 5.0e-7\n  lr_scheduler_type: linear\n  warmup_steps: 0.1\n  beta: 0.1\n",
}


def launch_line(plan: Plan, gpus: int, recipe: str) -> str:
    """The command that starts a recipe file as planned; on several machines it is given once on each."""
    machines = max(gpus // 8, 1)
    name = plan.layout if machines == 1 else f"{plan.layout}_multi_node"
    processes = "" if gpus == 1 else f" --num_processes {gpus}"
    if machines > 1:
        where = '--machine_rank "${MACHINE_RANK:-0}" --main_process_ip "${MAIN_PROCESS_IP:-127.0.0.1}"'
        processes += f" --num_machines {machines} {where}"
    return f"accelerate launch --config_file accelerate_configs/{name}.yaml{processes} recipes/sft_then_dpo.py --config {shlex.quote(recipe)}"


def write(
    folder: str,
    model: str,
    hft: HFTConfig,
    stages: dict[str, tuple[Task, Plan]],
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Path, Path]:
    """
    Write `recipe.yaml` for `recipes/sft_then_dpo.py` and `launch.sh`, with whole paths, since they are run from elsewhere.

    Args:
        folder (`str`):
            Where to; it is made if it does not exist.
        model (`str`):
            The model to start from.
        hft ([`HFTConfig`]):
            Method and selection.
        stages (`dict[str, tuple[Task, Plan]]`):
            Task and plan of `"sft"` and of `"dpo"`, under one launch configuration.
        revision (`str`, *optional*):
            Branch, tag or commit of a model on the hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the model's repository may run.

    Returns:
        `tuple[Path, Path]`: The two files.

    Raises:
        [`HFTError`]: If one of them is there already, a stage does not fit, or the folder can't be written.
    """
    for name, (_, plan) in stages.items():
        if not plan.fits:
            raise HFTError(
                f"--write: {name} does not fit, {(plan.total - plan.available) / 1e9:.1f} GB are missing on each GPU: see the plan "
                f"with --stage {name} for what helps."
            )
    place = resolved(folder)
    recipe, launch = place / RECIPE, place / LAUNCH
    for path in (recipe, launch):
        if path.exists():
            raise HFTError(f"--write: {str(path)!r} is there already: give another folder, or remove it.")
    task, plan = stages["sft"]
    line = launch_line(plan, task.gpus, str(recipe))
    storage = task.storage
    start = model if model == "demo" or not Path(model).is_dir() else str(resolved(model))
    source = f"  model_revision: {_scalar(revision)}\n" if revision else ""
    source += "  trust_remote_code: true\n" if trust_remote_code else ""
    text = f"""# Planned by `hft-trl plan`: {task.gpus} x {task.gpu_memory / 1e9:g} GB, {plan.layout}. Computed, not measured.
# Launch:   {line}

model:
  model_name_or_path: {_scalar(start)}
{source}  dtype: {storage.dtype}

output_dir: {_scalar(str(place / "run"))}
method: {hft.method}

hft:
  ratio: {hft.ratio}
  strategy: {hft.strategy}
  seed: {hft.seed}
"""
    if not hft.train_embeddings:
        text += "  train_embeddings: false\n"
    if storage.frozen_dtype and hft.method == "hft":
        text += f"  frozen_dtype: {storage.frozen_dtype}\n"
    if storage.frozen_quantization and hft.method == "hft":
        text += f"  frozen_quantization: {storage.frozen_quantization}\n"
    if storage.optimizer_in_backward:
        text += "  optimizer_in_backward: true\n"
    if storage.replicate_frozen and hft.method == "hft":
        text += "  replicate_frozen: true\n"
    data = DEMO if model == "demo" else DATA
    text += "".join(_stage(name, data[name], *stages[name]) for name in ("sft", "dpo"))
    with writing(folder):
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_text(recipe, text)
        with replacing(launch) as new:
            new.write_text(
                f"#!/usr/bin/env bash\n# From the root of the repository.\nset -euo pipefail\n{line}\n",
                encoding="utf-8",
            )
            new.chmod(0o755)
    return recipe, launch


def _scalar(text: str) -> str:
    """A text as YAML reads it back, quoted where it has to be."""
    return text if re.fullmatch(r"[A-Za-z/][\w./-]*", text) else json.dumps(text, ensure_ascii=False)


def _stage(name: str, data: str, task: Task, plan: Plan) -> str:
    selective = (
        f"  gradient_checkpointing_kwargs:\n    every_n_layers: {plan.checkpointed}\n" if plan.checkpointed > 1 else ""
    )
    divided = (
        "  accelerator_config: # gradients never wait whole for the last micro-batch: less memory, more traffic\n"
        "    gradient_accumulation_kwargs:\n      sync_each_batch: true\n"
        if plan.sync_each_batch
        else ""
    )
    unclipped = "  max_grad_norm: 0\n" if task.storage.optimizer_in_backward else ""
    return f"""
{name}:
{data}  max_length: {task.sequence_length}
  # Global batch {task.global_batch} = {task.gpus} x {plan.micro_batch} x {plan.accumulation}
  per_device_train_batch_size: {plan.micro_batch}
  gradient_accumulation_steps: {plan.accumulation}
{divided}{SCHEDULE[name]}  # About {plan.total / 1e9:.1f} of {plan.available / 1e9:.1f} GB on each GPU; checkpointing: {checkpointing(plan)}
  bf16: true
  gradient_checkpointing: {str(plan.checkpointed > 0).lower()}
{selective}  optim: {task.storage.optim}
{unclipped}  logging_steps: 10
  save_steps: 500
  save_total_limit: 2
  seed: 42
"""
