"""The verbs of the command line, a file each: options in, one call, what to print.

A verb takes the parsed options, with `overrides` {field: text} among them, and returns the exit code. What it does is
in the rooms below: `training`, `scoring`, `inference`, `results`, `export`, `serving`, `benchmarks`, `sweeps`, `data`.
"""
