"""Fine-tuning of a classifier, in pre-training's training loop."""
