"""Audio without torch: codecs, checks, resampling, worker processes, augmentation and degradations."""
