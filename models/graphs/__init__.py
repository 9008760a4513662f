"""Building and rewriting ONNX graphs."""
