"""Continual learning of tasks, and a measure of forgetting (TRACE, paper section 4.3)."""
