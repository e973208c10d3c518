"""The HTTP server of ``splitbundle serve``: OpenAI's interface, a page, health and metrics."""
