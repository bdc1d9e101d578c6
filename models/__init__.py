"""The embedded model family: weights, tokenizer and model cards."""
