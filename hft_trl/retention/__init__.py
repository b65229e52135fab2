"""What a model keeps of its base: text loss, KL to the base, and facts."""

PREFIX = "retention/"  # of the figures in log rows
