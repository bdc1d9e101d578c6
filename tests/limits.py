"""How long tests wait. Beside other programs, a test may have a small part of a core."""

from __future__ import annotations

CALL_S = 60.0
"""Bounds a hang: what a test waits for has happened long before."""
PROCESS_S = 180.0
"""Bounds the start or the end of a process that hangs."""
HANGS_MS = 500.0
"""What a call is given that its peer never answers, and has to receive: it passes, in real time."""
