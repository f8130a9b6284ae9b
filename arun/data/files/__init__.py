"""Files: sources and sinks for Parquet, JSON lines, CSV, Arrow IPC and OpenAI batches, on any file system."""
