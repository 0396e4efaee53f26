"""Predictions of any size by any number of processes: a plan, its parts, and the merge of them.

A job is a folder: `plan.json`, `parts/`, `leases/` and what the merge writes. Nobody talks to anybody but through it.
"""
