"""The research system's grid of experiments, replayed over measured outcomes (see docs/experiments.md)."""
