"""A prompt in, a blend out. Routers know the names of modules, not their weights."""
