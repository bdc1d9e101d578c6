"""From a request to an answer, for all engines: prompts to ids, tokens to text, drafts to what is kept."""
