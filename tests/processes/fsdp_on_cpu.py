"""FSDP on the CPU, for tests only: accelerate itself ignores FSDP there and silently falls back to DDP."""

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def enable() -> None:
    """Make accelerate take the FSDP plugin on CPU processes, as it does on GPUs. Without FSDP nothing changes."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            # In both states: every later AcceleratorState() copies the inner one's
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
