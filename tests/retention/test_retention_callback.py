"""The callback logs where everything else does, and training is the same with and without it."""

from types import MethodType, SimpleNamespace

import pytest
import torch
from conftest import one_line
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import QUIET, ResumableDPOTrainer, ResumableSFTTrainer, dpo_trainer, losses, sft_trainer, weights
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hft_trl import HFTConfig, HFTError, RetentionCallback
from hft_trl.chat import load_tokenizer
from hft_trl.recipe.rows import sft_dataset
from hft_trl.retention.meter import BASE_FILE, Meter

ROWS = {
    "texts": [f"Person {number} lives in city {number % 7}." for number in range(6)],
    "facts": [{"text": f"City {n} is", "answer": "large", "others": ["small", "far away"]} for n in range(4)],
    "prompts": [{"prompt": [{"role": "user", "content": f"Where does person {n} live?"}]} for n in range(5)],
}
NAMES = ["retention/text_loss", "retention/base_kl", "retention/facts"]


def measured(trainer) -> list[dict]:
    """The log rows of the meter, without the seconds, which no two runs share."""
    rows = [row for row in trainer.state.log_history if "retention/seconds" in row]
    return [{key: value for key, value in row.items() if key != "retention/seconds"} for row in rows]


def sft(base, tulu, folder, *callbacks, kind=ResumableSFTTrainer, hft=HFTConfig(), **settings):  # noqa: B008
    trainer = sft_trainer(kind, base, tulu, folder, hft, **settings)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


@pytest.mark.parametrize(
    ("hft", "settings"),
    [
        ({"method": "fft"}, {}),
        ({}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
        ({"frozen_dtype": "bfloat16"}, {"bf16": True}),
        ({"frozen_quantization": "int8"}, {}),
        ({"strategy": "element"}, {}),
        ({"optimizer_in_backward": True}, {"max_grad_norm": 0}),
        ({}, {"torch_compile": True, "torch_compile_backend": "eager"}),
    ],
    ids=["fft", "checkpointing", "mixed", "quantized", "element", "in backward", "compiled"],
)
def test_training_is_bit_identical_with_and_without_it(base, tulu, tmp_path, hft, settings):
    """And the log rows of training, apart from times, are the same."""
    logs = []
    for name, callbacks in (("with", [RetentionCallback(**ROWS, every=1)]), ("without", [])):
        trainer = sft(base, tulu, tmp_path / name, *callbacks, hft=HFTConfig(**hft), logging_steps=2, **settings)
        trainer.train()
        trainer.save_model()
        logs.append([(row["step"], row["loss"], row["entropy"]) for row in trainer.state.log_history if "loss" in row])
        if callbacks:
            assert [row["step"] for row in measured(trainer)] == [0, 1, 2, 3, 4]
    assert logs[0] == logs[1]
    with_it, without = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(with_it[name], without[name]) for name in without)


def test_the_policy_of_dpo_is_measured_and_trains_alike(base, ultrafeedback, tmp_path):
    trainers = []
    for name in ("with", "without"):
        trainer = dpo_trainer(ResumableDPOTrainer, base, ultrafeedback, tmp_path / name, HFTConfig())
        if name == "with":
            trainer.add_callback(RetentionCallback(**ROWS))
        trainer.train()
        trainers.append(trainer)
    assert losses(trainers[0]) == losses(trainers[1])
    start, end = measured(trainers[0])
    assert (start["step"], end["step"]) == (0, 4)
    assert start["retention/base_kl"] == 0
    meter = Meter(load_tokenizer(str(base)), **ROWS)
    policy = trainers[0].model
    found = meter.measure(policy, meter.base(AutoModelForCausalLM.from_pretrained(base)))
    assert [end[name] for name in NAMES] == pytest.approx([found[name.partition("/")[2]] for name in NAMES], abs=1e-6)


def test_it_works_with_trls_own_trainer_and_reaches_log_history_and_trackers(base, tulu, tmp_path):
    args = SFTConfig(str(tmp_path), **{**QUIET, "report_to": "tensorboard"}, include_num_input_tokens_seen="all")
    trainer = SFTTrainer(
        str(base),
        args,
        train_dataset=sft_dataset(tulu, "tulu"),
        processing_class=load_tokenizer(str(base)),
        callbacks=[RetentionCallback(**ROWS, every=3)],
    )
    trainer.train()
    rows = measured(trainer)
    assert [row["step"] for row in rows] == [0, 3, 4]
    assert all(row.keys() >= {*NAMES, "epoch", "num_input_tokens_seen"} for row in rows)
    assert all(row["retention/seconds"] > 0 for row in trainer.state.log_history if NAMES[0] in row)
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    for name in [*NAMES, "retention/seconds"]:
        (tag,) = [tag for tag in events.Tags()["scalars"] if tag.endswith(name)]
        assert [event.step for event in events.Scalars(tag)] == [0, 3, 4]
    last = {event.step: event.value for event in events.Scalars(f"train/{NAMES[0]}")}
    assert last[4] == pytest.approx(rows[-1][NAMES[0]])


class Killed(TrainerCallback):
    """Ends a run without a word after a step's checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.fixture
def killed(base, tulu, tmp_path):
    trainer = sft(base, tulu, tmp_path / "killed", RetentionCallback(**ROWS, every=1), Killed(), **SAVING)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return tmp_path / "killed"


SAVING = {"save_strategy": "steps", "save_steps": 2}


def resumed(base, tulu, folder, **rows):
    trainer = sft(base, tulu, folder, RetentionCallback(**{**ROWS, **rows}, every=1), **SAVING)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def test_a_killed_run_resumes_to_the_history_of_one_that_was_not(base, tulu, tmp_path, killed):
    """Compared with the base, not with the model of the checkpoint. Also where only the end is left."""
    whole = sft(base, tulu, tmp_path / "whole", RetentionCallback(**ROWS, every=1), **SAVING)
    whole.train()
    assert measured(resumed(base, tulu, killed)) == measured(whole)
    assert measured(resumed(base, tulu, killed)) == measured(whole)


def test_a_resumed_run_needs_the_bases_predictions_on_the_same_prompts(base, tulu, killed, monkeypatch):
    with pytest.raises(HFTError, match="has the base's predictions on other prompts") as error:
        resumed(base, tulu, killed, prompts=["Where?"])
    one_line(error)
    (killed / BASE_FILE).write_bytes((killed / BASE_FILE).read_bytes()[:100])
    with pytest.raises(HFTError, match="cannot be read"):
        resumed(base, tulu, killed)
    (killed / BASE_FILE).unlink()
    trainer = sft(base, tulu, killed, RetentionCallback(**ROWS), **SAVING)
    monkeypatch.setattr(trainer, "training_step", pytest.fail)  # before the first step, not at the next measurement
    with pytest.raises(HFTError, match="does not exist"):
        trainer.train(resume_from_checkpoint=True)
    resumed(base, tulu, killed, prompts=None)


def test_the_file_of_the_base_is_bounded_and_says_what_it_belongs_to(base, tulu, tmp_path):
    sft(base, tulu, tmp_path, RetentionCallback(**ROWS, max_rows=2), max_steps=1).train()
    with safe_open(tmp_path / BASE_FILE, framework="pt") as file:
        assert len(file.metadata()["prompts"]) == 64
        meter = Meter(load_tokenizer(str(base)), **ROWS, max_rows=2)
        assert list(file.get_tensor("ids").shape) == [sum(map(len, meter.prompts)), 128]
    assert not list(tmp_path.glob(".retention*"))


def test_a_later_stage_is_compared_with_the_base_of_the_first(base, tulu, tmp_path):
    first = sft(base, tulu, tmp_path / "first", RetentionCallback(**ROWS))
    first.train()
    first.save_model()
    given = RetentionCallback(**ROWS, base=tmp_path / "first" / BASE_FILE)
    second = sft(tmp_path / "first", tulu, tmp_path / "second", given, max_steps=1)
    second.train()
    assert measured(second)[0]["retention/base_kl"] == pytest.approx(
        measured(first)[-1]["retention/base_kl"], abs=1e-6
    )
    assert not (tmp_path / "second" / BASE_FILE).exists()


def evaluating(base, tulu, folder, callback, metric="retention/text_loss", order=1, stop=True, **settings):
    args = SFTConfig(
        str(folder),
        **{**QUIET, "save_strategy": "steps", "max_steps": 6, "learning_rate": 3e-2, **settings},
        **{"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True},
        metric_for_best_model=metric,
    )
    callbacks = [callback, EarlyStoppingCallback(2)][::order] if stop else [callback]
    rows = sft_dataset(tulu, "tulu")
    return SFTTrainer(
        str(base),
        args,
        train_dataset=rows,
        eval_dataset={"a": rows.select(range(2)), "b": rows.select(range(2))},
        processing_class=load_tokenizer(str(base)),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("order", [1, -1])
def test_the_best_model_is_chosen_and_training_stopped_by_a_figure(base, tulu, tmp_path, order):
    """Whichever of the callbacks the trainer has first. The model is worse on the text with every step."""
    fixed = RetentionCallback(texts=["qqqq zzzz qqqq zzzz"])
    trainer = evaluating(base, tulu, tmp_path, fixed, order=order)
    assert trainer.args.greater_is_better is False
    trainer.train()
    rows = measured(trainer)
    values = {row["step"]: row[NAMES[0]] for row in rows[:-1]}
    best = min(list(values)[1:], key=values.get)
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == values[best]
    assert trainer.state.global_step < 6  # stopped
    # The last row is of the best model, which is loaded at the end
    assert rows[-1][NAMES[0]] == pytest.approx(values[best], abs=1e-6)
    assert rows[-1]["step"] == trainer.state.global_step


def test_more_is_better_of_facts_and_less_of_kl_where_the_user_says_so(base, tulu, tmp_path):
    assert evaluating(base, tulu, tmp_path, RetentionCallback(**ROWS), NAMES[2]).args.greater_is_better is True
    trainer = evaluating(
        base, tulu, tmp_path, RetentionCallback(**ROWS), NAMES[1], stop=False, greater_is_better=False
    )
    trainer.train()
    values = {row["step"]: row[NAMES[1]] for row in measured(trainer)[1:]}
    assert trainer.state.best_global_step == min(values, key=values.get)


def test_an_evaluation_outside_of_training_is_not_measured(base, tulu, tmp_path):
    trainer = evaluating(base, tulu, tmp_path, RetentionCallback(**ROWS), stop=False, max_steps=1)
    assert not any("retention" in name for name in trainer.evaluate())
    trainer.train()
    rows = len(measured(trainer))
    assert not any("retention" in name for name in trainer.evaluate())
    assert len(measured(trainer)) == rows


def test_eval_on_start_measures_the_start_once(base, tulu, tmp_path):
    trainer = evaluating(base, tulu, tmp_path, RetentionCallback(**ROWS), stop=False, max_steps=1, eval_on_start=True)
    trainer.train()
    assert [row["step"] for row in measured(trainer)] == [0, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "texts, facts and prompts are all missing"),
        ({"texts": ["One two."], "every": 0}, "every is 0"),
        ({"texts": ["One two."], "every": "100"}, "every is '100'"),
        ({"texts": ["One two."], "max_rows": 0}, "max_rows is 0"),
        ({"texts": ["One two."], "max_rows": 1e3}, r"max_rows is 1000\.0"),
        ({"texts": "missing.txt"}, r"missing\.txt' cannot be read"),
    ],
)
def test_a_mistake_is_found_when_the_callback_is_made(given, message):
    with pytest.raises(HFTError, match=message) as error:
        RetentionCallback(**given)
    one_line(error)


def test_a_second_meter_in_one_trainer_is_rejected_before_the_first_step(base, tulu, tmp_path):
    """Its rows would never be measured: the figures of the first one at that step count as its own."""
    trainer = sft(base, tulu, tmp_path, RetentionCallback(texts=["a text"]), RetentionCallback(texts=["another"]))
    with pytest.raises(
        HFTError, match=r"callbacks has more than one RetentionCallback, .*: give all rows to one"
    ) as e:
        trainer.train()
    one_line(e)
    assert trainer.state.global_step == 0


def test_only_keywords_are_taken():
    with pytest.raises(TypeError, match="positional"):
        RetentionCallback(["One two."])


def test_a_second_trainer_with_the_same_callback_has_a_base_of_its_own(base, tulu, tmp_path):
    callback = RetentionCallback(**ROWS)
    first = sft(base, tulu, tmp_path / "a", callback)
    first.train()
    second = sft(first.model, tulu, tmp_path / "b", callback)
    second.train()
    start, end = measured(second)
    assert abs(start["retention/base_kl"]) < 1e-6 < end["retention/base_kl"]
    assert (tmp_path / "b" / BASE_FILE).is_file()


def test_a_trainer_that_trains_again_keeps_its_base(base, tulu, tmp_path):
    trainer = sft(base, tulu, tmp_path, RetentionCallback(**ROWS))
    trainer.train()
    of_start, end = (tmp_path / BASE_FILE).read_bytes(), measured(trainer)[-1]
    trainer.train()
    assert measured(trainer)[0]["retention/base_kl"] == pytest.approx(end["retention/base_kl"])
    assert (tmp_path / BASE_FILE).read_bytes() == of_start


def test_only_the_first_process_tokenizes(base, tulu, tokenizer, tmp_path, monkeypatch):
    """A second process is sent the rows of the first, which on another machine might come from another file."""
    sent = Meter(tokenizer, texts=ROWS["texts"])
    callback = RetentionCallback(texts=["of another machine"])
    trainer = sft(base, tulu, tmp_path, callback)
    monkeypatch.setattr("hft_trl.processes.PartialState", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr("hft_trl.processes.broadcast_object_list", lambda _: [sent, None])
    begins = MethodType(lambda self: callback.on_train_begin(processing_class=self.processing_class), trainer)
    begins()  # from a frame of the trainer
    assert callback._meter is sent
