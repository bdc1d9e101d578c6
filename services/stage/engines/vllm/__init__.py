"""The `vllm` engine: vLLM on an NVIDIA GPU."""
