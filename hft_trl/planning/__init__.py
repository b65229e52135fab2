"""What a training step takes, in memory and operations, from a model's config alone, and what fits a machine."""
