"""Checkpoints that are whole or refused, and a run that resumes from them in the same bits."""
