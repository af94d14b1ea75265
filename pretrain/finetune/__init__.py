"""Fine-tuning of a classifier."""
