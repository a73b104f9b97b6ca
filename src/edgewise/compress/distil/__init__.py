"""A student's training: `run.py` is the door, `trainer.py` the step alone."""
