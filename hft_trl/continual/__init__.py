"""Continual learning: tasks are learned one after the other, and forgetting is measured (TRACE, paper section 4.3)."""
