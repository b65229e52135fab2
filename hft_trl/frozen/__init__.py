"""The half that keeps its bits: known by its fingerprints, and optionally stored in another way."""
