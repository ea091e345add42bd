"""What the evaluator costs, against the plain way to get the same numbers."""
