"""Shared code of the commands that make, check and repair record sets."""
