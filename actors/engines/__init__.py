"""What the engines speak with: vLLM in this process, and servers over HTTP."""
