"""Channels, calls and certificates that the client and asd's services share; not part of the client's API."""
