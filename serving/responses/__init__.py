"""Events of generations to OpenAI's response objects, whole and in chunks."""
