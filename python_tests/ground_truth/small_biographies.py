"""Flags for biographies that are made in seconds."""

# Twelve people, two of them held out, and two phrasings of each question: 144 sentences.
TINY = (
    *("--entities", "12", "--templates", "2", "--heldout-fraction", "0.2", "--heads", "2"),
    *("--blocks", "2", "--d-model", "32", "--num-threads", "1", "--learning-rate", "1e-2"),
)
