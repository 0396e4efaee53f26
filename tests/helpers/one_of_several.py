"""One of several processes, which sum numbers up together until they are told to stop: `one_of_several.py RESULT`."""

import argparse
import os
import pathlib
import sys
import time

from instseg_jax import peers


def work(options: argparse.Namespace) -> int:
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from instseg_jax.devices import coordination_client, join_processes
    from instseg_jax.training.signals import StopSignals

    join_processes(
        options.coordinator, options.num_processes, options.process_id, timeout=options.initialization_timeout
    )
    with peers.watch(coordination_client(), jax.process_index(), jax.process_count()), StopSignals() as stop:
        peers.write_here_if_lost(pathlib.Path(options.result))
        step = 0
        while not stop.asked(step):
            if step < 3 or not options.is_quiet:
                multihost_utils.process_allgather(np.ones(3))
            step += 1
            print(f"step {step} pid {os.getpid()}", flush=True)
            time.sleep(0.05)
        return peers.REQUEUE if stop.is_to_be_requeued() else 0


if __name__ == "__main__":
    if peers.is_wanted(sys.argv[1:]):
        raise SystemExit(peers.stand_by(sys.argv[1:]))
    parser = argparse.ArgumentParser()
    parser.add_argument("result")
    parser.add_argument("--coordinator")
    for name in ("num_processes", "process_id", "initialization_timeout", "initialization_tries"):
        parser.add_argument(f"--{name}", type=int, default=60)
    parser.add_argument("--is_quiet", action="store_true")
    raise SystemExit(work(parser.parse_args()))
