"""vLLM as the engine: what runs inside its processes, and what talks to them."""
