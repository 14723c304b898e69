"""vLLM as a backend: the same requests, run by vLLM's engine. Nothing of vLLM is imported before it is opened."""
