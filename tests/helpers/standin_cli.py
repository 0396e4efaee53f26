"""The command line with a stand-in for the network, which finds plain rectangles.

INSTSEG_STANDIN is `SIZE,SECONDS`: the side of its input, and how long it waits at each call, as for a device. Last it
says the CPU seconds and the memory of the process, and how long it was busy from its first call on.
"""

import dataclasses
import os
import resource
import sys
import time

from fake_model import make_pipeline

from instseg_jax.cli import main
from instseg_jax.memory import peak_memory_mb
from instseg_jax.verbs import predict

size, seconds = os.environ.get("INSTSEG_STANDIN", "160,0").split(",")
pipeline = make_pipeline(image_size=int(size), batch_size=4)
began: list[float] = []


def run(images):
    began.append(time.time())
    time.sleep(float(seconds))
    return pipeline.run(images)


predict._pipeline = lambda options: dataclasses.replace(pipeline, run=run)
code = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
first = began[0] if began else time.time()
print("standin:", used.ru_utime + used.ru_stime, peak_memory_mb(), first, time.time())
sys.exit(code)
