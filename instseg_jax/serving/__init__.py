"""A pipeline behind HTTP: `app.run_server` is the door, `server` answers what comes through it.

`requests` and `schema` say what may come in and goes out, `fetch` reads URLs safely, `batching` forms batches,
`client.py` is for whoever has no package but this one file.
"""
