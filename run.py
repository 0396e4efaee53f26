"""The command line from a checkout: `python run.py VERB ...`; `instseg VERB ...` where installed."""

from instseg_jax.cli import run

if __name__ == "__main__":
    run()
