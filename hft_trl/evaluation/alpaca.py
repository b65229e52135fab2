"""Replies in the format of AlpacaEval, for its own judge."""

import errno
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hft_trl.chat import load_tokenizer
from hft_trl.errors import HFTError, as_user_error
from hft_trl.evaluation.models import find_models
from hft_trl.files import read_json, write_json
from hft_trl.generate import chat

Row = dict[str, str]


def read_prompts(path: Path) -> list[Row]:
    """
    Read AlpacaEval's prompts.

    Args:
        path (`Path`):
            A JSON list of objects with `instruction`, and `dataset` where it is known: `alpaca_eval.json` of the data set
            `tatsu-lab/alpaca_eval`, or an outputs file of any model. What else the objects hold is left aside.

    Returns:
        `list[dict[str, str]]`: `instruction` and `dataset` of each.

    Raises:
        [`HFTError`]: If there is no such file, or it is another kind of file.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise HFTError(
            f"the prompts {str(path)!r} can't be read ({error.strerror}): give a local copy of alpaca_eval.json."
        ) from error
    except ValueError as error:
        raise HFTError(f"the prompts {str(path)!r} are no JSON ({error}): give a copy of alpaca_eval.json.") from error
    if not isinstance(content, list) or not content:
        raise HFTError(f"the prompts {str(path)!r} hold no list of objects: give a copy of alpaca_eval.json.")
    for number, row in enumerate(content):
        if not isinstance(row, dict) or not isinstance(row.get("instruction"), str):
            raise HFTError(f"row {number} of the prompts {str(path)!r} has no text named 'instruction'.")
    return [{"instruction": row["instruction"], "dataset": str(row.get("dataset", ""))} for row in content]


def replies(
    name: str,
    rows: list[Row],
    generator: str,
    *,
    chat_template: str | None = None,
    dtype: str = "auto",
    batch_size: int = 16,
    max_new_tokens: int = 2048,
) -> list[Row]:
    """
    Greedy replies of a model in its chat form.

    Args:
        name (`str`):
            Folder or hub id of the model, or `"demo"`.
        rows (`list[dict[str, str]]`):
            What [`read_prompts`] gives.
        generator (`str`):
            Name of the model in the outputs.
        chat_template (`str`, *optional*):
            `"tulu"` or the path of a `.jinja` file. By default the tokenizer's own, and Tülu's if it has none.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type in which the weights are loaded, `"auto"` for the file's.
        batch_size (`int`, *optional*, defaults to `16`):
            Prompts in a batch.
        max_new_tokens (`int`, *optional*, defaults to `2048`):
            Longest reply, in tokens.

    Returns:
        `list[dict[str, str]]`: `instruction`, `output`, `generator` and `dataset` of each prompt, in order.

    Raises:
        [`HFTError`]: If there is no such model.
    """
    (folder,) = find_models([name]).values()
    tokenizer = load_tokenizer(str(folder), chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    with as_user_error(f"the model {name!r}"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    outputs = chat(model, tokenizer, [row["instruction"] for row in rows], max_new_tokens, batch_size, progress=True)
    return [
        {
            "instruction": row["instruction"],
            "output": output,
            "generator": generator,
            "dataset": row["dataset"],
        }
        for row, output in zip(rows, outputs, strict=True)
    ]


def check_output(path: Path) -> None:
    """
    See that an outputs file can be written, before hours of replies.

    Raises:
        [`HFTError`]: If it can't.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise HFTError(f"{path} can't be written ({error.strerror}): choose another --output.") from error


def write_outputs(rows: list[Row], path: Path) -> None:
    """
    Write an outputs file.

    Args:
        rows (`list[dict[str, str]]`):
            What [`replies`] gives.
        path (`Path`):
            The file. Its folder is made if it is missing.

    Raises:
        [`HFTError`]: If it can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, rows, ensure_ascii=False)
    except OSError as error:
        raise HFTError(f"{path} can't be written ({error.strerror}): choose another --output.") from error
