"""Memory and time of a run, estimated before it is launched (scripts/plan.py)."""
