"""The `onnx` engine: onnxruntime-genai on the CPU."""
