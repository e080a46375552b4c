"""What plug-ins and their tests need: contract suites, an in-memory storage, tiny real models."""
