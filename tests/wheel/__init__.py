"""The distribution with none, one or both of its extras."""
