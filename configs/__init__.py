"""Runs by name: base.py has the schema, every other module the settings of one run."""
