"""The NPUs that ship with the server; each is loaded by name, none imports another."""
