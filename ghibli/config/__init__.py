"""What can be set: the schema, its checks, and the words for a wrong setting."""
