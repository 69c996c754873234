"""Made-up people, a small language model that knows them, and what slots learn from both."""
