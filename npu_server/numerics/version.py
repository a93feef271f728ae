"""The version of the arithmetic that profiles are read by."""

ARITHMETIC_VERSION = 7
"""Part of every profile's hash. Raise it by one with every change, here or in the compiler, after which a
profile yields another bit than before; then commit what `python tests/golden/make_golden.py` writes."""
