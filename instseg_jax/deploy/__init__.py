"""Serving: a pipeline behind HTTP. The web framework is in `server.py` alone."""
