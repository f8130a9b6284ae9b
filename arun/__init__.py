"""arun: an async-native actor runtime for Python."""
