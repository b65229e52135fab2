"""Memory and operations of a training step from a model's config, and settings that fit a machine."""
