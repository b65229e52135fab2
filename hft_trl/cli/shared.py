"""What the commands of `hft-trl` share: options that are settings of HFT, and silence while they work."""

import dataclasses
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hft_trl.config import HFTConfig

if TYPE_CHECKING:
    from typer.models import OptionInfo


Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let code from the model's repository run.")
]


def setting(name: str, text: str | None = None) -> "OptionInfo":
    """The option for a field of [`HFTConfig`], with the default and, unless the command says it otherwise, its help."""
    field = HFTConfig.__dataclass_fields__[name]
    default = "none" if field.default is dataclasses.MISSING else str(field.default).lower()
    return typer.Option(help=f"{text or field.metadata['help']} [default: {default}]")


def given(**settings: Any) -> dict[str, Any]:
    """The settings that the user gave."""
    return {name: value for name, value in settings.items() if value not in (None, [])}


@contextmanager
def quiet(below: int = logging.ERROR) -> Iterator[None]:
    """
    Keep libraries from talking over the answer while a model is built: errors still come as exceptions.

    Args:
        below (`int`, *optional*, defaults to `logging.ERROR`):
            Lowest level of the logging that is shown.
    """
    before = logging.root.manager.disable
    logging.disable(below - 1)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
