"""Hugging Face in both directions, ONNX, and training that starts from a trained model."""
