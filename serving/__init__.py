"""HTTP, chat format, metrics and the command line."""
