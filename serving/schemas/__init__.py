"""Request bodies: what is accepted, and what is refused by name. Nothing is dropped silently."""
