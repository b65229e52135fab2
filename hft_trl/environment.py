"""What a run ran on: versions of the libraries, and the machine."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("hft_trl", "torch", "transformers", "trl", "accelerate", "datasets")


def environment() -> dict[str, Any]:
    """
    Versions of the libraries and what the run ran on.

    Returns:
        `dict[str, Any]`: A version for each package, and `python`, `platform`, `device`.
    """
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
    """
    Version of an installed package, without importing it.

    Args:
        name (`str`):
            Name of the distribution.

    Returns:
        `str`: The version, or `"unknown"` for a package that runs without being installed.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
