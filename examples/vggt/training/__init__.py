"""What the training scripts share: settings, methods, batches, checkpoints, memory, launching."""
