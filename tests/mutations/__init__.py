"""Small errors put into the arithmetic on purpose: somebody else's numbers must notice each of them."""
