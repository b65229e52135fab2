"""A SIGTERM while training: one checkpoint at the end of the step, from which a rerun ends in the same bits."""

import os
import signal

import pytest
from conftest import tiny_llama
from training import ResumableSFTTrainer
from transformers import TrainerCallback
from trl import SFTConfig

from hft_trl import HFTError
from hft_trl.checkpoints.whole import last_whole_checkpoint
from hft_trl.errors import Stopped, exit_on_user_error
from hft_trl.recipe.rows import sft_dataset


class Terminate(TrainerCallback):
    """Sends SIGTERM to the own process while a step is being computed."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def dropping(tmp_path_factory, tokenizer):
    """A model with dropout, whose training depends on the state of the random numbers."""
    folder = tmp_path_factory.mktemp("dropping")
    tiny_llama(len(tokenizer), attention_dropout=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trainer_for(model, rows, folder, step=None, kind=ResumableSFTTrainer, **settings):
    settings = {
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False,
        "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "num_train_epochs": 2,
        "enable_jit_checkpoint": True, **settings,
    }  # fmt: skip
    data = sft_dataset(rows.select(range(16)).select_columns(["messages"]), "tulu")
    data = data.map(lambda row: {"text": str(row["messages"])}, remove_columns=["messages"])
    return kind(
        model=str(model),
        args=SFTConfig(str(folder), **settings),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[Terminate(step)] if step else [],
    )


def saved(trainer, folder) -> bytes:
    trainer.save_model()
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [2, 4, 8], ids=lambda step: f"step{step}")
@pytest.mark.parametrize(
    "settings",
    [
        {"save_strategy": "no"},
        {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1},
        {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 1},
        {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"},
    ],
    ids=lambda settings: settings["save_strategy"],
)
def test_a_rerun_after_sigterm_ends_in_the_same_bits_wherever_it_came(dropping, tulu, tmp_path, settings, step):
    """With dropout, inside an epoch, at its end and at the last step, whatever else is saved and evaluated when."""
    whole = trainer_for(dropping, tulu, tmp_path / "whole", **settings)
    whole.train()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        trainer_for(dropping, tulu, tmp_path / "cut", step, **settings).train()
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    checkpoint = str(tmp_path / "cut" / f"checkpoint-{step}")
    assert last_whole_checkpoint(tmp_path / "cut") == checkpoint
    rerun = trainer_for(dropping, tulu, tmp_path / "cut", **settings)
    rerun.train(resume_from_checkpoint=True)
    assert saved(rerun, tmp_path / "cut") == saved(whole, tmp_path / "whole")
    rows = [
        [(row["step"], row[key]) for row in trainer.state.log_history for key in ("loss", "eval_loss") if key in row]
        for trainer in (whole, rerun)
    ]
    assert rows[0] == rows[1]


def test_trackers_are_closed_and_other_callbacks_get_their_events(dropping, tulu, tmp_path):
    events = []

    class Listens(TrainerCallback):
        def on_save(self, *args, **kwargs):
            events.append("save")

        def on_train_end(self, *args, **kwargs):
            events.append("end")

    trainer = trainer_for(dropping, tulu, tmp_path, 3, save_strategy="no")
    trainer.add_callback(Listens())
    with pytest.raises(Stopped):
        trainer.train()
    assert events == ["save", "end"]


def test_sigterm_is_handled_as_before_however_training_ended(dropping, tulu, tmp_path):
    """After a batch that did not fit and was halved, which begins training twice, and after an error."""
    before, batches = signal.getsignal(signal.SIGTERM), []

    class DoesNotFit(ResumableSFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            batches.append(len(inputs["input_ids"]))
            if batches[-1] > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    class Diverges(ResumableSFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * float("nan")

    trainer_for(dropping, tulu, tmp_path / "a", kind=DoesNotFit, max_steps=2, auto_find_batch_size=True).train()
    assert batches[0] > 2
    assert batches[-1] <= 2
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(HFTError, match="loss is nan"):
        trainer_for(dropping, tulu, tmp_path / "b", kind=Diverges, max_steps=2).train()
    assert signal.getsignal(signal.SIGTERM) == before


def test_without_the_setting_sigterm_is_left_alone(dropping, tulu, tmp_path):
    trainer = trainer_for(dropping, tulu, tmp_path, enable_jit_checkpoint=False, max_steps=1)
    handlers = []

    class Looks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            handlers.append(signal.getsignal(signal.SIGTERM))

    trainer.add_callback(Looks())
    trainer.train()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_sigterm_outside_of_training_ends_with_143_and_one_line_and_the_handler_goes_away(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 143
    assert capsys.readouterr().err.startswith("stopped: SIGTERM")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_ctrl_c_is_one_line_of_the_first_process_and_code_130(monkeypatch, capsys, rank, lines):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("stopped: Ctrl-C") for line in said] == [True] * lines
