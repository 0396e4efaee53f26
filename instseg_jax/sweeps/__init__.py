"""Sweeps: which runs a question needs (`plan`), running them as processes (`launch`), what came out (`tables`)."""
