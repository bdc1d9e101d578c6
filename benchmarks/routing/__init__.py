"""Routing between real models by the prompt alone, trained and tested on their published outcomes."""
