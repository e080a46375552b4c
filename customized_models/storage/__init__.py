"""The registry's bytes: immutable directories under keys."""
