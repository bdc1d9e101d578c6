"""The engines' common parts: prompts to ids, tokens to text, and the verification of drafts."""
