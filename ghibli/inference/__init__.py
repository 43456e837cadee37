"""After a run: load, generate, restyle, export, push."""
