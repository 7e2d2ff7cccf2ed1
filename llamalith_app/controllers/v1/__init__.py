"""The routes of OpenAI clients, under /v1 and /chat/v1."""
