"""Audit of a DatasetDict: text, audio, and confounds."""
