"""Fine-tune wav2vec 2.0 and its relatives to tell English accents apart, with SpeechBrain."""

__version__ = "0.1.0"
