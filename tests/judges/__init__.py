"""Independent engines judge profiles: each layer, on the judge's own input, element by element."""
