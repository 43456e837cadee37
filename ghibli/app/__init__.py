"""The Gradio page of `ghibli app`."""
