"""A pipeline behind HTTP: `server.run_server` is the door. The web framework is in `server.py` alone.

`requests` and `schema` say what may come in and goes out, `fetch` reads URLs safely, `batching` forms batches,
`client.py` is for whoever has no package but this one file.
"""
