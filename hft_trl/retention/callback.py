"""Log during training what a model keeps of its base."""

import gc
import time
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import (
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler

from hft_trl.errors import HFTError
from hft_trl.processes import by_first_process
from hft_trl.retention.meter import BASE_FILE, Base, Meter, read_base, write_base
from hft_trl.retention.retention_rows import Rows, read_facts, read_prompts, read_texts

PREFIX = "retention/"


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
            if value is not None and value < 1:
                raise HFTError(f"{name} is {value}: it must be at least 1.")
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
        self._handler: CallbackHandler | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *_: Any,
        model: Any,
        processing_class: Any,
        optimizer: Any,
        **__: Any,
    ) -> None:
        tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise HFTError(
                f"processing_class is a {type(tokenizer).__name__}: give the trainer the model's tokenizer, which "
                "RetentionCallback needs."
            )
        # Once, as texts may be long. Machines may also have different files of one name.
        meter = [by_first_process(partial(Meter, tokenizer, **self._rows))]
        (self._meter,) = broadcast_object_list(meter)
        # A trainer passes its callbacks neither itself nor a way to log, so this searches for the handler that calls
        # this one. By type, as `isinstance` would ask lazily loaded objects for their class.
        handlers = (found for found in gc.get_objects() if issubclass(type(found), CallbackHandler))
        mine = (
            handler
            for handler in handlers
            if handler.model is model
            and handler.optimizer is optimizer
            and any(callback is self for callback in handler.callbacks)
        )
        self._handler = next(mine, None)
        if self._handler is None:
            raise HFTError(
                "RetentionCallback does not find its trainer: call gc.freeze() before the trainer is built, not after."
            )
        # First, so that EarlyStoppingCallback finds the figures in the metrics of an evaluation. Callbacks after the
        # one that is called now keep their places.
        self._handler.callbacks.remove(self)
        self._handler.callbacks.insert(0, self)
        if self._meter.prompts and (self._base_file is not None or state.global_step > 0):
            # Now, so that a missing file is found before the first step
            file = self._base_file or Path(args.output_dir) / BASE_FILE
            found = [by_first_process(partial(read_base, file, self._meter))]
            (self._base,) = broadcast_object_list(found)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Not when training begins: trackers and storages of the frozen half may not be set up by then
        if state.global_step == 0:
            self._measure(args, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._every is not None and state.global_step % self._every == 0:
            self._measure(args, state, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        if self._handler is not None:  # else an evaluation outside of training
            figures = self._measure(args, state, control)
            metrics.update({f"eval_{name}": value for name, value in figures.items()})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # After a SIGTERM, when little time is left, training ends without its last log row
        if state.log_history and "train_loss" in state.log_history[-1]:
            best = state.best_global_step if args.load_best_model_at_end else None
            self._measure(args, state, control, again=best not in (None, state.global_step))
        self._handler = self._meter = self._base = None  # frees the model; another trainer has another base

    def _measure(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, again: bool = False
    ) -> dict[str, float]:
        """Measure and log, unless it was done at this step, and return the figures."""
        model = self._handler.model
        here = [row for row in state.log_history if row["step"] == state.global_step and f"{PREFIX}seconds" in row]
        if here and not again:
            known = {name: value for name, value in here[-1].items() if name.startswith(PREFIX)}
            del known[f"{PREFIX}seconds"]
            return known
        started = time.perf_counter()
        if self._meter.prompts and self._base is None:  # nothing is trained yet
            self._base = self._meter.base(model)
            file = Path(args.output_dir) / BASE_FILE
            by_first_process(partial(write_base, file, self._base, self._meter))
        figures = {f"{PREFIX}{name}": value for name, value in self._meter.measure(model, self._base).items()}
        logs = {**figures, f"{PREFIX}seconds": round(time.perf_counter() - started, 3), "epoch": state.epoch}
        if args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = state.num_input_tokens_seen
        # As Trainer.log does. That of TRL's trainers would also log, and forget, what they have collected so far.
        state.log_history.append({**logs, "step": state.global_step})
        should_log = control.should_log
        self._handler.on_log(args, state, control, logs)
        control.should_log = should_log
        return figures
