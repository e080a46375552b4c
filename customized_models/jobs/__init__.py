"""Work in the background, each job in a process of its own."""
