"""What the training scripts share: losses, data, checkpoints and validation."""
