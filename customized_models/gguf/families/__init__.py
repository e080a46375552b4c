"""One file for each family of architectures that can become a GGUF file."""
