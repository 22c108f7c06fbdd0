"""What the Brain needs: options, batches, loaders, checkpoints, feature cache, processes."""
