"""Metrics and protocols of face recognition; each protocol is also a command."""
