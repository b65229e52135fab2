"""Shared by the commands of `hft-trl`: options for the settings of HFT, and silenced libraries."""

import dataclasses
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, Literal

import typer
from typer.models import OptionInfo

from hft_trl.config import HFTConfig

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow code from the model's repository to run.")
]
OfMatrices = Literal["category", "layer", "model"]  # strategies that take matrices by their shapes alone
FIELDS = HFTConfig.__dataclass_fields__


def setting(name: str, text: str | None = None) -> OptionInfo:
    """Make the option for a field of [`HFTConfig`], with its default and `text` or its help."""
    default = "none" if FIELDS[name].default is dataclasses.MISSING else str(FIELDS[name].default).lower()
    return typer.Option(help=f"{text or FIELDS[name].metadata['help']} [default: {default}]")


def given(**arguments: Any) -> dict[str, Any]:
    """Return the settings of HFT among a command's arguments, without those that the user did not set."""
    return {name: value for name, value in arguments.items() if name in FIELDS and value not in (None, [])}


@contextmanager
def quiet(below: int = logging.ERROR) -> Iterator[None]:
    """Hide warnings and logging below a level, and send what libraries print to standard error."""
    before = logging.root.manager.disable
    logging.disable(below - 1)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
