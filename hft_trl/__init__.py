"""Half Fine-Tuning (HFT) for TRL."""
