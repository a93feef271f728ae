"""Breadth: networks that nobody chose for us, each captured, compiled, compared and trained for a step."""
