"""The frozen reference of preference training."""
