"""From files and data sets to questions, prompts and their order; what a completion is."""
