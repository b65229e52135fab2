"""What the backends (DDP, FSDP, DeepSpeed) need so that a half can be frozen, and what they can't do."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from hft_trl.errors import HFTError


def check_backend(state: AcceleratorState) -> None:
    """
    Refuse a backend, or settings of one, under which a half can't be frozen or checked.

    Args:
        state ([`~accelerate.state.AcceleratorState`]):
            State of the accelerator that the trainer runs on.

    Raises:
        [`HFTError`]: Naming the setting and what to use instead.
    """
    if state.distributed_type == DistributedType.FSDP:
        if state.fsdp_plugin.fsdp_version == 1:
            raise HFTError(
                "fsdp_version is 1, which flattens trainable and frozen parameters into one: set fsdp_version to 2, as in "
                "accelerate_configs/fsdp2.yaml."
            )
        if state.fsdp_plugin.cpu_ram_efficient_loading:
            raise HFTError(
                "fsdp_cpu_ram_efficient_loading is true, which leaves the weights of all processes but the first empty, so "
                "they can't be fingerprinted: set it to false."
            )
