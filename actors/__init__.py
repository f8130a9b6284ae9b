"""Long-lived actors and where they live."""
