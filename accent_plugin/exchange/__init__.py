"""Import from and export to Hugging Face, export to ONNX, and training from a trained model."""
