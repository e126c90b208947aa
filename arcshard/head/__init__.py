"""The head: the maths, the memory plan and the optimizer of sharded class centers."""
