"""Running a plan layer by layer: what every backend shares; the kernels alone are its own."""
