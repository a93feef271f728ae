"""Whole networks that others wrote: compiled, compared bit for bit, and trained for a step."""
