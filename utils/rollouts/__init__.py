"""From a policy and prompts to completions: caches, compiled steps, drawing, ends."""
