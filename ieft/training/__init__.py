"""Training with Accelerate: the trainer, its losses, training items, hard negatives, checkpoints."""
