"""From completions to a gradient: micro-batches, log-probs, shared prompts, the optimizer."""
