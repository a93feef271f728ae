"""A second opinion on the compiler: whole networks quantized by rules of the documentation alone.

Nothing here but `product.py` knows the code under test.
"""
