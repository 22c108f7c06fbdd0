"""Samples in, samples out: codecs, checks, resampling, worker processes, augmentation, degradations. No torch."""
