"""Margins: the formulas of the losses, as pure functions of similarities."""
