"""Integer arithmetic of NPUs: profiles, scales, requantization, as pure functions on NumPy arrays."""
