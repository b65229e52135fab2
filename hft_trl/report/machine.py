"""What a run ran on: versions of the libraries, and the machine."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("hft_trl", "torch", "transformers", "trl", "accelerate", "datasets")


def environment(processes: int | None = None) -> dict[str, Any]:
    """
    Versions of the libraries and what the run ran on.

    Args:
        processes (`int`, *optional*):
            Number of processes of the run; by default that of the running process group, or 1.

    Returns:
        `dict[str, Any]`: A version for each package, and `python`, `platform`, `device`, `processes`.
    """
    import torch

    if processes is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if distributed else 1
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
        "processes": processes,
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
