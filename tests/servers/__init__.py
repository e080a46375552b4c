"""Real servers for the tests: how they are built, started and watched."""
