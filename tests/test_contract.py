"""
What of transformers, TRL and accelerate is used though it is private:

all of it is listed, and there as expected.
"""

import ast
import inspect
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import deepspeed
from transformers.trainer_callback import CallbackHandler
from transformers.utils import cached_file
from trl import DPOTrainer, SFTTrainer

import hft_trl

ALL_OF_RUN_EPOCH = (
    "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval start_time "
    "resume_from_checkpoint epochs_trained steps_trained_in_current_epoch"
)

# By owner, the parameters of each method that is called or overridden
METHODS = {
    (Trainer, "_get_grad_norm"): "model grad_norm",
    (Trainer, "_save"): "output_dir state_dict",
    (Trainer, "_load_from_checkpoint"): "resume_from_checkpoint model",
    (Trainer, "_issue_warnings_after_load"): "load_result",
    (Trainer, "_init_training_state"): (
        "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial"
    ),
    (Trainer, "_load_callback_state"): "",
    (Trainer, "_run_epoch"): ALL_OF_RUN_EPOCH,
    (Trainer, "_finalize_training"): "trial num_train_samples start_time",
    (Trainer, "_save_checkpoint"): "model trial",
    (Trainer, "_get_output_dir"): "trial",
    (Trainer, "_finish_current_push"): "",
    (Trainer, "_remove_unused_columns"): "dataset description",
    (Trainer, "_prepare_inputs"): "inputs",
    (DPOTrainer, "_precompute_ref_logps"): "dataset name batch_size",
    (AcceleratorState, "_reset_state"): "reset_partial_state",
}

# Attributes that are read or set, by the class or module whose source has them
ATTRIBUTES = {
    "_metrics": (SFTTrainer, DPOTrainer),
    "_precompute_model_hash": (DPOTrainer,),
    "_train_batch_size": (Trainer,),
    "_shared_state": (PartialState, AcceleratorState, GradientState),
    "_n_gpu": (TrainingArguments,),
    "_hf_deepspeed_config_weak_ref": (deepspeed,),
    "_no_split_modules": (PreTrainedModel,),
    "_keep_in_fp32_modules_strict": (PreTrainedModel,),
    "_name_or_path": (PreTrainedModel,),
    "_fingerprint": (Dataset,),
    "_raise_exceptions_for_missing_entries": (inspect.getmodule(cached_file),),
    "_raise_exceptions_for_connection_errors": (inspect.getmodule(cached_file),),
    "_raise_exceptions_for_gated_repo": (inspect.getmodule(cached_file),),
}

# Private only by their line in front, and documented: Python's and torch's own
DOCUMENTED = {"_asdict", "_replace", "_exit"}
# Parts of operators' names in torch.ops, which a step's ledger counts by
OPERATORS = {
    *("_cdata", "_overloadpacket", "_to_copy", "_grouped_mm"),
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"),
}


@pytest.mark.parametrize(("owner", "name"), METHODS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_private_method_exists_with_the_parameters_that_are_counted_on(owner, name):
    method = inspect.getattr_static(owner, name, None)
    assert method is not None, f"{owner.__name__} has no {name} any more"
    found = [parameter for parameter in inspect.signature(getattr(owner, name)).parameters if parameter != "self"]
    assert found == METHODS[owner, name].split(), f"{owner.__name__}.{name} takes {found}"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_private_attribute_is_still_where_it_is_looked_for(name):
    for owner in ATTRIBUTES[name]:
        assert name in inspect.getsource(owner), f"{owner.__name__} has no {name} any more"


def private_names() -> dict[str, set[str]]:
    """Private names that the package uses and does not define itself, with the files that use them."""
    used: dict[str, set[str]] = {}
    defined = set()
    for path in Path(hft_trl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute | ast.keyword):
                name = node.attr if isinstance(node, ast.Attribute) else node.arg or ""
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    defined.add(name)
                elif name.startswith("_") and not name.startswith("__"):
                    used.setdefault(name, set()).add(path.name)
    return {name: files for name, files in used.items() if name not in defined}


def test_nothing_private_is_used_that_is_not_listed_here():
    listed = {name for _, name in METHODS} | ATTRIBUTES.keys() | DOCUMENTED | OPERATORS
    unlisted = {name: files for name, files in private_names().items() if name not in listed}
    assert not unlisted


# Public, but not promised: what a RetentionCallback counts on, as lines of the source of a method
COUNTED_ON = {
    (CallbackHandler, "__init__"): ["self.callbacks = []", "self.model = model"],
    (CallbackHandler, "call_event"): [
        "for callback in self.callbacks:",
        "processing_class=self.processing_class,",
    ],
    (CallbackHandler, "on_log"): ["control.should_log = False"],
    # The metrics of an evaluation, which the best model is chosen by, are those that callbacks get
    (Trainer, "evaluate"): [
        "self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, output.metrics)",
        "return output.metrics",
    ],
    # The last log row of a training that was not stopped by a signal
    (Trainer, "_finalize_training"): [
        'metrics["train_loss"] = train_loss',
        "self.log(metrics)",
        "self._load_best_model()",
        "self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)",
    ],
}


@pytest.mark.parametrize(("owner", "name"), COUNTED_ON, ids=lambda value: value if isinstance(value, str) else "")
def test_a_trainer_calls_its_callbacks_as_retention_counts_on(owner, name):
    source = [line.strip() for line in inspect.getsource(getattr(owner, name)).splitlines()]
    places = [source.index(line) for line in COUNTED_ON[owner, name] if line in source]
    assert len(places) == len(COUNTED_ON[owner, name]), COUNTED_ON[owner, name]
    assert places == sorted(places)
