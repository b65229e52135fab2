"""Saved models: what their files hold, how two of them differ, and Half-Reset."""
