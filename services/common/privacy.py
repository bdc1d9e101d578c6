"""Switches off the usage reports of the libraries that asd uses."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# The libraries' own switches.
SWITCHES: Mapping[str, str] = {
    # onnxruntime (1.32) and onnxruntime-genai (0.18) keep an id of the device and a store of events in the
    # user's cache, and upload to mobile.events.data.microsoft.com. Their `disable_telemetry_events` comes too
    # late: all of this has happened before it can be called.
    "ORT_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TRTLLM_NO_USAGE_STATS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Several libraries read it (https://donottrack.sh).
    "DO_NOT_TRACK": "1",
}


def report_nothing() -> None:
    """Switch the reports off in this process and its children. Variables that are already set stay.

    Call it before these libraries are imported: they read the environment at import.
    """
    for variable, value in SWITCHES.items():
        os.environ.setdefault(variable, value)
