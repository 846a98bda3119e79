"""From completions to numbers: built-in functions, those of users, servers, models."""
