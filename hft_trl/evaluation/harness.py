"""lm-evaluation-harness: its tasks loaded, and a model asked. The only module that imports it."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from lm_eval import evaluate
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from hft_trl.backends.zero import whole_models
from hft_trl.errors import HFTError, as_user_error, first_line
from hft_trl.evaluation.suites import TASKS, Task

Results = dict[str, dict[str, Any]]


class SharedOutLM(HFLM):
    """
    The harness's model class for a model that is loaded already, its items shared out over the processes.

    The harness's own way counts GPUs: several processes on CPUs would each run every item, and on several machines it
    takes the rank within the machine for the rank.

    Args:
        folder (`Path`):
            Folder of the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        dtype (`str`):
            Type in which the weights are loaded, `"auto"` for the file's.
        batch_size (`int`):
            Items of a batch in each process.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: str, batch_size: int) -> None:
        state = PartialState()
        with as_user_error(f"the model {str(folder)!r}"), whole_models():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(state.device)
        with quiet_harness():
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._rank, self._world_size = state.process_index, state.num_processes

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes in one."""
        return gather(tensor)

    def barrier(self) -> None:
        """Wait for the other processes."""
        PartialState().wait_for_everyone()


def load_tasks(tasks: Iterable[Task]) -> dict[str, dict[str, Any]]:
    """
    Load tasks and their data, which the harness downloads.

    Args:
        tasks (`Iterable[Task]`):
            The tasks.

    Returns:
        `dict[str, dict]`: What the harness's `TaskManager.load` gives, by task.

    Raises:
        [`HFTError`]: If a task's data can't be loaded.
    """
    tasks = list(tasks)
    # Reading the harness's thousands of task files takes longer than the embedded world's suite.
    manager = TaskManager(include_path=str(TASKS), include_defaults=any("hft_demo" not in task.name for task in tasks))
    loaded = {}
    with quiet_harness(), PartialState().local_main_process_first():
        for task in tasks:
            with as_user_error(f"the task {task.name}"):
                loaded[task.name] = manager.load([task.name])
    return loaded


def ask(lm: SharedOutLM, task: Task, loaded: dict[str, Any], limit: int | None, run_code: bool) -> Results | None:
    """
    Ask a model all items of a task. Every process has to call.

    Args:
        lm ([`SharedOutLM`]):
            The model.
        task ([`Task`]):
            The task.
        loaded (`dict`):
            What [`load_tasks`] gave for it.
        limit (`int`, *optional*):
            Number of items of each (sub)task, by default all.
        run_code (`bool`):
            Whether grading may run code that the model wrote.

    Returns:
        `dict[str, dict]`: The harness's results by task and group, `None` in other processes than the first.

    Raises:
        [`HFTError`]: If the model's positions don't hold a prompt and a reply.
    """
    for part in loaded["tasks"].values():
        shots = task.num_fewshot if task.num_fewshot is not None else part.get_config("num_fewshot")
        part.set_config(key="num_fewshot", value=shots or 0)
        part.set_fewshot_seed(DEFAULT_OTHER_SEED)  # each time anew, so that every model sees the same examples
    # In the chat form every special token comes from the template, as in training.
    lm.add_bos_token = False if task.chat else None
    with torch.random.fork_rng():
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
        except AssertionError as error:  # the harness's way to say that a prompt doesn't fit
            raise HFTError(f"{task.name} can't be asked of {lm.model.name_or_path!r}: {first_line(error)}") from error
    return {**found["results"], **found.get("groups", {})} if found else None


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the harness from warning about what is meant, such as a model that is loaded already."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
