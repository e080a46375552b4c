"""Model cards: read from what files say of a model, rendered as its `README.md`."""
