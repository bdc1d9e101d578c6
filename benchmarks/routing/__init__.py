"""Routing between real models from the prompt alone: trained and tested on published outcomes of theirs."""
