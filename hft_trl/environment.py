"""Versions of the libraries, and the machine of a run."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("hft_trl", "torch", "transformers", "trl", "accelerate", "datasets")


def environment() -> dict[str, Any]:
    """Return the version of each package, and `python`, `platform` and `device`."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    elif torch.accelerator.is_available():
        device = str(torch.accelerator.current_accelerator())
    else:
        device = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    return {
        **{name: package_version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
    }


def package_version(name: str) -> str:
    """Return an installed package's version without importing it, or `"unknown"`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
