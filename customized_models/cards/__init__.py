"""Model cards: read from a model's files, and rendered as its `README.md`."""
