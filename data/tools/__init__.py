"""What the commands that make, check and repair record sets share (scripts/pack.py, doctor.py)."""
