"""A server: the protocols of OpenAI, Ollama and Wyoming over one engine. Knows nothing of arithmetic and screens."""
