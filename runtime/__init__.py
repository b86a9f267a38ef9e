"""A blend and a request in, tokens out. No HTTP."""
