"""Saved models: their files, differences between two of them, and Half-Reset."""
