"""Bodies that are passed on as they are, once it is decided what serves them."""
