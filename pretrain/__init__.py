"""Pre-training: the training loop, evaluation on frozen features, comparisons and their commands."""
