"""Delta checkpoints: what training changes, to be put back onto the start model's frozen half."""

from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
)
from transformers.trainer_utils import HubStrategy
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, logging

from hft_trl.config import HFTConfig
from hft_trl.demo import model_path
from hft_trl.errors import HFTError, as_user_error
from hft_trl.selection import Selection
from hft_trl.weights import check_readable, combined_digest, fingerprints, weight_files

logger = logging.get_logger(__name__)

DELTA_FILE = "hft_delta.safetensors"

README = """\
This checkpoint of Half Fine-Tuning holds what training changes ({file}). The rest is the start model
`{start}` (weights `{digest}`). Rerun the training command to go on from it, or make a whole model of it with

    hft-trl restore {checkpoint} OUTPUT
"""


def wanted(config: HFTConfig, args: TrainingArguments, state: AcceleratorState) -> bool:
    """
    Whether a trainer's checkpoints hold the trainable half only.

    Args:
        config ([`HFTConfig`]):
            The settings of HFT. With `method="fft"` everything is trained, so checkpoints are whole all the same.
        args ([`~transformers.TrainingArguments`]):
            The trainer's arguments.
        state ([`~accelerate.state.AcceleratorState`]):
            State of the accelerator that the trainer runs on.

    Raises:
        [`HFTError`]: If the backend writes whole checkpoints, or unfinished models would be pushed to the hub.
    """
    if not config.delta_checkpoints:
        return False
    if config.method == "fft":
        logger.warning("hft.delta_checkpoints has no effect with method fft: everything is trained, so all is saved.")
        return False
    if state.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise HFTError(
            f"hft.delta_checkpoints is true, but {state.distributed_type.value} writes whole checkpoints in a format of its "
            "own: set it to false, or train in one process or with DDP."
        )
    if args.push_to_hub and args.hub_strategy != HubStrategy.END:
        raise HFTError(
            f"hft.delta_checkpoints is true, and hub_strategy {args.hub_strategy.value!r} would push checkpoints that are "
            "no models: set hub_strategy to 'end'."
        )
    return True


def is_delta(checkpoint: str | Path) -> bool:
    """Whether a folder is a delta checkpoint."""
    return (Path(checkpoint) / DELTA_FILE).is_file()


def tensor_files(checkpoint: str | Path) -> dict[str, Path]:
    """Where a checkpoint, delta, adapter or whole, keeps its tensors: the file of each, as [`weight_files`] gives it."""
    files = [Path(checkpoint) / name for name in (DELTA_FILE, ADAPTER_SAFE_WEIGHTS_NAME)]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        return weight_files(str(checkpoint))
    check_readable([path])
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), path)


def save(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    selection: Selection,
    folder: str | Path,
) -> None:
    """
    Write the trainable parameters, the model's config and the tokenizer, and no `model.safetensors`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model without the backend's wrapper.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            The tokenizer.
        selection ([`Selection`]):
            Which parameters are trained, and from which start model.
        folder (`str` or `Path`):
            The checkpoint's folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    start = selection.start_model
    (folder / "README.md").write_text(
        README.format(
            file=DELTA_FILE, start=start["name_or_path"], digest=start["weights_digest"], checkpoint=folder.name
        ),
        encoding="utf-8",
    )
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    state = model.state_dict()
    # Buffers that a model saves may change while training, as running statistics do.
    buffers = state.keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = sorted({*selection.trainable, *buffers})
    save_file({name: state[name].contiguous() for name in names}, folder / DELTA_FILE, metadata={"format": "pt"})


def load(model: torch.nn.Module, checkpoint: str | Path) -> None:
    """
    Put a delta checkpoint's tensors into a model that still has its start model's frozen half.

    Args:
        model (`torch.nn.Module`):
            The model without the backend's wrapper.
        checkpoint (`str` or `Path`):
            The delta checkpoint.

    Raises:
        [`HFTError`]: If the file is torn, or its tensors are not the model's.
    """
    path = Path(checkpoint) / DELTA_FILE
    check_readable([path])
    state = model.state_dict()
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118 - no dictionary
            if isinstance(state.get(name), DTensor):
                raise HFTError(
                    f"{path} can't be put into a model that FSDP has sharded: resume in one process or with DDP."
                )
            tensor = file.get_tensor(name)
            if name not in state or state[name].shape != tensor.shape:
                raise HFTError(
                    f"{path} holds {name} of shape {tuple(tensor.shape)}, which the model has not: use its own."
                )
            state[name].copy_(tensor)


def restore(checkpoint: str | Path, output: str | Path, start_model: str | None = None) -> None:
    """
    Make a whole model of a delta checkpoint. It takes the memory of one model.

    Args:
        checkpoint (`str` or `Path`):
            The delta checkpoint.
        output (`str` or `Path`):
            Folder for the model, its tokenizer and `hft_selection.json`.
        start_model (`str`, *optional*):
            Hub id or folder of the model that training started from. Defaults to where it was then.

    Raises:
        [`HFTError`]: If the folder is no delta checkpoint, or the start model is gone or has other weights.
    """
    if not is_delta(checkpoint):
        raise HFTError(
            f"{str(checkpoint)!r} has no {DELTA_FILE}: give a checkpoint of a run with hft.delta_checkpoints."
        )
    selection = Selection.load(checkpoint)
    start = model_path(start_model) if start_model else selection.start_model["name_or_path"]
    with as_user_error(f"the start model {start!r}"):
        config = AutoConfig.from_pretrained(checkpoint)
        model = AutoModelForCausalLM.from_pretrained(start, config=config, dtype=config.dtype)
    digest = combined_digest(fingerprints(model.named_parameters()))
    if digest != selection.start_model["weights_digest"]:
        raise HFTError(
            f"{str(checkpoint)!r} was started from a model with weights {selection.start_model['weights_digest'][:16]}, but "
            f"{start!r} has {digest[:16]}: give the model that training started from."
        )
    load(model, checkpoint)
    if model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(output)
    selection.save(output)
