"""Tools around the trainer: where, how fast, with what and how it looks, never what it computes."""
