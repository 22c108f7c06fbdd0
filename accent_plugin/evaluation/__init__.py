"""Metrics, calibration, comparison and confidence intervals, computed from arrays."""
