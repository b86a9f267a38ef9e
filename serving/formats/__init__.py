"""Forms of answers that a client asks for: JSON, tool calls."""
