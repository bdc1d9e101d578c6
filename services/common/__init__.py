"""Code that all asd services share: errors, servers, channels, settings, telemetry. No cascade logic."""
