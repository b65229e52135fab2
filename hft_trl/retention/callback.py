"""Log during training what a model keeps of its base."""

import inspect
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from hft_trl.errors import HFTError
from hft_trl.processes import by_first_process
from hft_trl.retention import PREFIX
from hft_trl.retention.meter import BASE_FILE, Base, Meter, read_base, write_base
from hft_trl.retention.retention_rows import Rows, read_facts, read_prompts, read_texts


class RetentionCallback(TrainerCallback):
    """
    Measure during training what the model keeps of its base, for any TRL trainer of a causal LM.

    It logs `retention/text_loss` (loss per token on general text), `retention/base_kl` (KL(base || model) per token on
    prompts), `retention/facts` (percent of cloze facts that the model knows) and `retention/seconds` (time that the
    measurement took). Measurements are at the start, every `every` steps, at each evaluation and at the end. Training
    is bit-identical with and without it.

    The figures can choose the best model and stop training early: `metric_for_best_model="retention/text_loss"`. Set
    `greater_is_better=False` for `retention/base_kl`, as transformers knows only names that end in `loss`.

    The base is the model before the first step. Its predictions on the prompts are computed once and kept in
    `output_dir/retention_base.safetensors`, which a resumed run reads. In a later stage `base` is the file of the
    first one: the reference of DPO is the SFT model, not the base.

    Args:
        texts (`str`, `Path` or sequence, *optional*): Text file, `.jsonl` rows with a `text`, or strings.
        facts (`str`, `Path` or sequence, *optional*): `.jsonl` file, or rows with `text`, `answer` and `others`.
        prompts (`str`, `Path` or sequence, *optional*): `.jsonl` file, or rows with `messages` or a `prompt`.
        every (`int`, *optional*): Steps between measurements. By default only at the start, evaluations and the end.
        max_rows (`int`, *optional*, defaults to 128): Largest number of text blocks (of 256 tokens), of facts and of
            prompts. It bounds the cost.
        base (`str` or `Path`, *optional*): File with the predictions of another base, from an earlier run.

    Example:

    ```python
    >>> from hft_trl import HFTSFTTrainer, RetentionCallback

    >>> meter = RetentionCallback(texts="wikitext.txt", facts="facts.jsonl", every=100)
    >>> trainer = HFTSFTTrainer("Qwen/Qwen3-0.6B-Base", args, train_dataset=dataset, callbacks=[meter])
    ```
    """

    def __init__(
        self,
        *,
        texts: Rows | None = None,
        facts: Rows | None = None,
        prompts: Rows | None = None,
        every: int | None = None,
        max_rows: int = 128,
        base: str | Path | None = None,
    ) -> None:
        if texts is None and facts is None and prompts is None:
            raise HFTError("texts, facts and prompts are all missing: give at least one to measure retention on.")
        for name, value in (("every", every), ("max_rows", max_rows)):
            if value is not None and (type(value) is not int or value < 1):
                raise HFTError(f"{name} is {value!r}: it must be a whole number of at least 1.")
        # Read now, so that a mistake in a file is found before training
        self._rows = {
            "texts": None if texts is None else read_texts(texts),
            "facts": None if facts is None else read_facts(facts),
            "prompts": None if prompts is None else read_prompts(prompts),
            "max_rows": max_rows,
        }
        self._every = every
        self._base_file = None if base is None else Path(base)
        self._base: Base | None = None
        self._meter: Meter | None = None
        self._trainer: Trainer | None = None
        self._based_on: weakref.ref[Trainer] | None = None  # the trainer whose start model is the base

    def on_train_begin(self, *_: Any, processing_class: Any, **__: Any) -> None:
        tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise HFTError(
                f"processing_class is a {type(tokenizer).__name__}: give the trainer the model's tokenizer, which "
                "RetentionCallback needs."
            )
        # Once, as texts may be long. Machines may also have different files of one name.
        self._meter = by_first_process(partial(Meter, tokenizer, **self._rows))
        # A trainer passes its callbacks neither itself nor a way to log, but it is what calls them
        frame = inspect.currentframe()
        while not isinstance(frame.f_locals.get("self"), Trainer):
            frame = frame.f_back
        self._trainer = frame.f_locals["self"]
        if self._based_on is None or self._based_on() is not self._trainer:  # another trainer has another base
            self._base = None
        self._based_on = weakref.ref(self._trainer)
        if sum(isinstance(callback, RetentionCallback) for callback in self._trainer.callback_handler.callbacks) > 1:
            raise HFTError(
                "callbacks has more than one RetentionCallback, and their figures have the same names: give all rows "
                "to one."
            )
        # First, so that EarlyStoppingCallback finds the figures in the metrics of an evaluation. Callbacks after the
        # one that is called now keep their places.
        self._trainer.callback_handler.callbacks.remove(self)
        self._trainer.callback_handler.callbacks.insert(0, self)
        if self._meter.prompts and (self._base_file is not None or self._trainer.state.global_step > 0):
            # Now, so that a missing file is found before the first step
            file = self._base_file or Path(self._trainer.args.output_dir) / BASE_FILE
            self._base = by_first_process(partial(read_base, file, self._meter))

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        # Not when training begins: trackers and storages of the frozen half may not be set up by then
        if self._trainer.state.global_step == 0:
            self._measure()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self._every is not None and self._trainer.state.global_step % self._every == 0:
            self._measure()

    def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
        if self._trainer is not None:  # else an evaluation outside of training
            figures = self._measure()
            metrics.update({f"eval_{name}": value for name, value in figures.items()})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        # After a SIGTERM, when little time is left, training ends without its last log row
        if state.log_history and "train_loss" in state.log_history[-1]:
            best = state.best_global_step if args.load_best_model_at_end else None
            self._measure(again=best not in (None, state.global_step))
        self._trainer = self._meter = None  # frees the model

    def _measure(self, again: bool = False) -> dict[str, float]:
        """Measure and log, unless it was done at this step, and return the figures."""
        trainer, state, model = self._trainer, self._trainer.state, self._trainer.callback_handler.model
        here = [row for row in state.log_history if row["step"] == state.global_step and f"{PREFIX}seconds" in row]
        if here and not again:
            known = {name: value for name, value in here[-1].items() if name.startswith(PREFIX)}
            del known[f"{PREFIX}seconds"]
            return known
        started = time.perf_counter()
        if self._meter.prompts and self._base is None:  # nothing is trained yet
            self._base = self._meter.base(model)
            file = Path(trainer.args.output_dir) / BASE_FILE
            by_first_process(partial(write_base, file, self._base, self._meter))
        figures = {f"{PREFIX}{name}": value for name, value in self._meter.measure(model, self._base).items()}
        should_log, seconds = trainer.control.should_log, round(time.perf_counter() - started, 3)
        # The `log` of TRL's trainers would also log, and forget, what they have collected so far
        Trainer.log(trainer, {**figures, f"{PREFIX}seconds": seconds})
        trainer.control.should_log = should_log
        return figures
