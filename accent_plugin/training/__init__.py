"""Training: the Brain, options, batches, loaders, checkpoints, feature cache, distributed training and signals."""
