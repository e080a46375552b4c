"""Models handed to deployment tools."""
