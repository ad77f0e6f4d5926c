"""Models that the experiments adapt, and the readers of their pretrained checkpoints."""
