"""How MLX computes here: limits, cores, faster parts. cuda/ and x86/ can be deleted."""
