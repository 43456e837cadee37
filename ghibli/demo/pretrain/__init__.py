"""How the demo base was trained."""
