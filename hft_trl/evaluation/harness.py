"""lm-evaluation-harness: loading tasks and evaluating a model. The only module that imports it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from hft_trl.backends.zero import whole_models
from hft_trl.errors import HFTError, as_user_error, first_line
from hft_trl.evaluation.suites import TASKS, Task

LOGGER = logging.getLogger("lm_eval")  # warns of intended settings while loading, such as a model that is loaded


class SharedOutLM(HFLM):
    """
    The harness's model class, with the items divided among the processes. `batch_size` is per process.

    The harness counts GPUs: several processes on CPUs would each run every item. On several machines it takes the
    local rank for the rank.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: str, batch_size: int) -> None:
        state = PartialState()
        with as_user_error(f"the model {str(folder)!r}"), whole_models():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(state.device)
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._rank, self._world_size = state.process_index, state.num_processes

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return gather(tensor)

    def barrier(self) -> None:
        PartialState().wait_for_everyone()


def load_model(backend: str, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: str, batch_size: int) -> LM:
    """Load a model into the harness's class for a backend, `"hf"` or `"vllm"`."""
    LOGGER.setLevel(logging.ERROR)
    if backend == "hf":
        return SharedOutLM(folder, tokenizer, dtype, batch_size)
    from lm_eval.models.vllm_causallms import VLLM

    with as_user_error(f"the model {str(folder)!r}"):
        lm = VLLM(pretrained=str(folder), dtype=dtype, batch_size="auto")
    lm.hf_chat_template = tokenizer.chat_template
    return lm


def load_tasks(tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """Load tasks and download their data. Returns the harness's `TaskManager.load` by task."""
    LOGGER.setLevel(logging.ERROR)
    # Reading the harness's thousands of task files takes longer than the embedded world's suite
    manager = TaskManager(include_path=str(TASKS), include_defaults=any("hft_demo" not in task.name for task in tasks))
    loaded = {}
    with PartialState().local_main_process_first():
        for task in tasks:
            with as_user_error(f"the task {task.name}"):
                loaded[task.name] = manager.load([task.name])
    return loaded


def ask(lm: LM, task: Task, loaded: dict[str, Any], limit: int | None, run_code: bool) -> dict[str, Any] | None:
    """Evaluate a model on a task of [`load_tasks`]. Only the first process gets the results."""
    LOGGER.setLevel(logging.WARNING)
    for part in loaded["tasks"].values():
        shots = task.num_fewshot if task.num_fewshot is not None else part.get_config("num_fewshot")
        part.set_config(key="num_fewshot", value=shots or 0)
        part.set_fewshot_seed(DEFAULT_OTHER_SEED)  # set for each model, so that all see the same examples
    # In the chat form every special token comes from the template, as in training
    lm.add_bos_token = False if task.chat else None
    with torch.random.fork_rng(), whole_models():  # else generation waits for processes that have fewer items
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            found = evaluate(
                lm,
                loaded,
                limit=limit,
                log_samples=False,
                apply_chat_template=task.chat,
                fewshot_as_multiturn=task.chat,
                confirm_run_unsafe_code=run_code,
            )
        except AssertionError as error:  # raised by the harness for a prompt that does not fit
            raise HFTError(
                f"{task.name} cannot be evaluated for {lm.tokenizer.name_or_path!r}: {first_line(error)}"
            ) from error
    return {**found["results"], **found.get("groups", {})} if found else None
