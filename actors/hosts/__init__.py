"""The actor's side: its process, its messages, its health."""
