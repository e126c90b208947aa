"""Helpers of the trainer: config, process groups, log, files and measurements."""
