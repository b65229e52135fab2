"""What the backends (DDP, FSDP, DeepSpeed) need so that a half can be frozen."""
