"""Checkpoints that are complete or rejected, and runs that resume from them bit for bit."""
