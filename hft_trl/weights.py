"""Parameters by name, their fingerprints, and the files of a saved model."""

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from hft_trl.errors import HFTError
from hft_trl.files import read_or_reject

# What torch.compile and FSDP's activation checkpointing put into names, at the start and in between
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}


def plain_name(name: str) -> str:
    """Remove what wrappers have put into the name of a parameter or module."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def named_parameters(
    model: torch.nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters of a model by their plain names, in its own order."""
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        yield plain_name(name), parameter


def named_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the modules of a model by their plain names; of a wrapper and its content the content."""
    return {plain_name(name): module for name, module in model.named_modules()}


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Return whether ZeRO-3 holds the parameter in parts, one in every process."""
    return hasattr(tensor, "ds_id")  # as DeepSpeed itself asks


def numel(parameter: torch.Tensor) -> int:
    """Return the number of elements of the whole parameter, partitioned or not."""
    return parameter.ds_numel if is_partitioned(parameter) else parameter.numel()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor, gathered if FSDP2 has sharded or ZeRO-3 partitioned it."""
    if is_partitioned(tensor):
        import deepspeed
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if tensor.ds_status == ZeroParamStatus.AVAILABLE:  # small ones stay whole, and must not be taken apart here
            return tensor.detach().clone()
        with deepspeed.zero.GatheredParameters(tensor):
            return tensor.detach().clone()
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        # Under CPU offload the shards lie in main memory, where NCCL gathers nothing.
        return tensor.to(tensor.device_mesh.device_type).full_tensor()
    return tensor


# Elements compared or written at a time, so that the memory needed does not grow with the tensors.
CHUNK = 1 << 18


# Elements that one thread copies from a GPU at a time: few megabytes, so that starting a copy costs little.
PIECE = 1 << 21


def fingerprint(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """Return the SHA-256 (hex) of a tensor's dtype, shape and bytes, converted to `dtype` if it is given."""
    dtype = dtype if dtype is not None else tensor.dtype
    digest = hashlib.sha256(f"{dtype} {tuple(tensor.shape)} ".encode())
    for piece in tensor.detach().contiguous().reshape(-1).split(PIECE if tensor.is_cuda else CHUNK):
        # Converted on the host, since a GPU may round a NaN to other bits
        digest.update(memoryview(_on_host(piece).to(dtype).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _on_host(piece: torch.Tensor) -> torch.Tensor:
    """Return a piece in main memory. From a GPU it is copied into pinned memory."""
    if not piece.is_cuda:
        return piece.cpu()
    return torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True).copy_(piece)


def fingerprints(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Fingerprint named tensors one by one. Under FSDP2 and ZeRO-3 every process has to call."""
    # hashlib and copies release the interpreter lock, so each thread copies and hashes its own tensors at over 1 GB/s.
    # Tensors are gathered in order, since gathering is a collective operation, and each gathered one leaves the GPU at
    # once, so that no second whole tensor lies there.
    workers = min(16, max(4, torch.get_num_threads()))
    digests: dict[str, str] = {}
    pending: deque[tuple[str, Future[str]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for name, tensor in tensors:
            if len(pending) == workers:
                done, future = pending.popleft()
                digests[done] = future.result()
            gathered = isinstance(tensor, DTensor) or is_partitioned(tensor)
            whole = full(tensor)
            pending.append((name, pool.submit(fingerprint, whole.cpu() if gathered else whole)))
        digests.update((name, future.result()) for name, future in pending)
    return digests


def combined_digest(content: Any) -> str:
    """Return one SHA-256 (hex) of plain JSON, such as the fingerprints of a model's parameters."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def weight_files(model: str, revision: str | None = None) -> dict[str, Path]:
    """
    Return the safetensors file of each tensor of a saved model: a folder or cached hub id.

    Nothing is downloaded. A model without a complete set of safetensors files raises an [`HFTError`].
    """
    local = {"revision": revision, "local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    # In the order of `from_pretrained`: an index may be left over from shards that a single file has replaced.
    single = cached_file(model, SAFE_WEIGHTS_NAME, **local)
    if single is not None:
        check_readable([Path(single)])
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), Path(single))
    index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME, **local)
    if index is not None:
        return _listed(Path(index))
    for pickled in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if cached_file(model, pickled, **local) is not None:
            raise HFTError(
                f"{model!r} holds no {SAFE_WEIGHTS_NAME} but {pickled}, which is not read: load it with "
                "from_pretrained and save it with save_pretrained first."
            )
    raise HFTError(f"{model!r} holds no {SAFE_WEIGHTS_NAME}: save (or download) it as safetensors first.")


def _listed(index: Path) -> dict[str, Path]:
    """Return the file of every tensor in an index. All must be beside it and readable."""
    names = read_or_reject(index, "save or download the model again", weight_map=dict)["weight_map"]
    for name, file in names.items():
        if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file:
            raise HFTError(
                f"the index {index} says that {name} is in {file!r}, which is no file beside it: download the model "
                "again."
            )
    files = {name: index.with_name(file) for name, file in names.items()}
    check_readable(files.values())
    return files


def check_readable(files: Iterable[Path]) -> None:
    """Raise an [`HFTError`] naming the first safetensors file that is missing, cut short or unreadable."""
    for path in sorted(set(files)):
        try:
            # By the system's own reason: safetensors calls a file missing that this user may not read
            with path.open("rb"), safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            reason = (error.strerror or error) if isinstance(error, OSError) else error
            raise HFTError(
                f"{path} is missing or incomplete, or this user may not read it ({reason}): save or download the "
                "model again, or change its permissions."
            ) from error


def tensors(files: Mapping[str, Path], names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors from their safetensors files, mapped from the disk."""
    wanted = sorted(names, key=lambda name: (str(files[name]), name))
    for path, group in itertools.groupby(wanted, key=files.__getitem__):
        with safe_open(path, framework="pt") as file:
            yield from ((name, file.get_tensor(name)) for name in group)


# By their names in safetensors files
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def rounds(published: torch.dtype | None, dtype: torch.dtype) -> bool:
    """Return whether weights of one type lose digits in another, as float16 in bfloat16."""
    return published is not None and torch.promote_types(published, dtype) != dtype


def check_not_rounded(
    model: str, dtypes: Mapping[str, torch.dtype], revision: str | None = None, remedy: str | None = None
) -> None:
    """Reject a model that was rounded when it was loaded, given the types of its parameters and a remedy."""
    try:
        files = weight_files(model, revision) if model else {}
    except (HFTError, OSError):  # without safetensors files it cannot be checked
        return
    for path in set(files.values()):
        with safe_open(path, framework="pt") as file:
            for name in set(file.keys()) & dtypes.keys():
                on_disk = file.get_slice(name).get_dtype()
                if rounds(DTYPES.get(on_disk), dtypes[name]):
                    raise HFTError(
                        f"dtype {str(dtypes[name]).removeprefix('torch.')} rounds {name}, which is {on_disk} in "
                        f"{model!r}, so the frozen half could not keep its bits: "
                        f"{remedy or 'load the model with dtype float32'}, or save it in that dtype first."
                    )
