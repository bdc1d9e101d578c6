"""Graded task suites: generators and checkers. Pure Python: no model, no service."""
