"""The network as a file for other runtimes, with proof that it finds the same.

Doors: `export.export_model` (a folder with model, config.json, parity.json), `accelerate.accelerate` (the quickest
runtime for a checkpoint). `standalone.py` is copied into every export. What runs an export is `runtimes/exported.py`.
"""
