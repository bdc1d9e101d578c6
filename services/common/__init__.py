"""What every asd service shares: errors, servers, channels, settings, telemetry. No cascade logic."""
