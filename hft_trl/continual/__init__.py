"""Continual learning: tasks one after the other, and what is left of the earlier ones (TRACE, paper section 4.3)."""
