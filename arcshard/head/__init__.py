"""The head: the math, the memory plan and the optimizer of sharded class centers."""
