"""Channels, calls and certificates that the client shares with asd's own services; no part of its API."""
