"""A run from its folder to its end: state, log, checkpoints, evaluation, what the user reads."""
