"""The selection that a start model or a checkpoint was trained with, and whether training may resume with another."""

import os
from pathlib import Path

from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import cached_file

from hft_trl.errors import HFTError
from hft_trl.selection.marks import remembered
from hft_trl.selection.selection import SELECTION_FILE, Selection


def selection_of(model: PreTrainedModel) -> Selection | None:
    """
    Return the selection that a model was trained with, `None` if it has none.

    It is the one that this object was last trained with, otherwise that of the folder or hub repository of its
    weights.
    """
    if (selection := remembered(model)) is not None:
        return selection
    source = model.config._name_or_path
    if Path(source).is_dir():
        return Selection.load(source) if source and (Path(source) / SELECTION_FILE).is_file() else None
    try:
        file = cached_file(
            source,
            SELECTION_FILE,
            revision=vars(model.config).get("_commit_hash"),
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # a folder that is gone by now, or a name that is no hub id
        return None
    return Selection.load(Path(file).parent) if file is not None else None


def check_resumable(selection: Selection, resume_from: str | os.PathLike | bool | None, output_dir: str) -> bool:
    """
    Reject a checkpoint that was trained with another selection or from another start model.

    With another selection the optimizer's states would go to the wrong parameters, without an error where shapes
    agree.

    `resume_from` is the argument of `train`: a folder, `True` for the last checkpoint in `output_dir`, or nothing.

    Returns:
        `bool`: Whether training resumes at all.

    Raises:
        [`HFTError`]: With both digests and the settings that differ.
    """
    checkpoint = get_last_checkpoint(output_dir) if resume_from is True and Path(output_dir).is_dir() else resume_from
    if not checkpoint or checkpoint is True:
        return False
    if selection.config.method == "fft" and not (Path(checkpoint) / SELECTION_FILE).exists():
        return True
    if not (Path(checkpoint) / SELECTION_FILE).is_file():
        raise HFTError(
            f"{checkpoint} has no {SELECTION_FILE}: it was not trained with HFT, so HFT can't resume from it."
        )
    saved = Selection.load(checkpoint)
    if saved.digest != selection.digest:
        ours, theirs = selection.config.selecting(), saved.config.selecting()
        settings = [
            f"{key} {theirs.get(key, 'unused')!r} there, {ours.get(key, 'unused')!r} here"
            for key in ours | theirs
            if theirs.get(key) != ours.get(key)
        ]
        if saved.seed != selection.seed:
            settings.append(f"effective seed {saved.seed} there, {selection.seed} here")
        raise HFTError(
            f"{checkpoint} was trained with selection {saved.digest[:16]}, this run has {selection.digest[:16]} "
            f"({'; '.join(settings) or 'the parameter names or masks differ'}): resume with the checkpoint's "
            "settings, or train into another output_dir."
        )
    if saved.start_model and selection.start_model and saved.start_model != selection.start_model:
        start, here = saved.start_model, selection.start_model
        if start["weights_digest"] != here["weights_digest"]:
            raise HFTError(
                f"{checkpoint} was started from {start['name_or_path']!r} (weights {start['weights_digest'][:16]}), "
                f"this run from {here['name_or_path']!r} (weights {here['weights_digest'][:16]}): start from the same "
                "model, or train into another output_dir."
            )
    return True
