"""What the training loop calls, from building a run to saving it."""
