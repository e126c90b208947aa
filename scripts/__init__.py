"""Commands for data sets, models and machines."""
