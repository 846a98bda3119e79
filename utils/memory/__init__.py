"""How much fits: the plan, what is measured, what happens when memory runs out."""
