"""After a run: generate, restyle, serve, export, push."""
