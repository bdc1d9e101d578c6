"""Outcomes to policy: collect, fit, evaluate. Behind `asd-policy`; never imported at serving time."""
