"""The complete state of a run on disk: saved in the background, verified, resumed on any ranks."""
