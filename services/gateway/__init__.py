"""The gateway: OpenAI's and Anthropic's HTTP APIs over the cascade's gRPC API."""
