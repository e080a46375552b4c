"""An untrusted adapter directory becomes a checked private copy, and its facts."""
