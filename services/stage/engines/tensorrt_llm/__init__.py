"""The `tensorrt_llm` engine: TensorRT-LLM on an NVIDIA GPU."""
