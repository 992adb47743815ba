"""The PyTorch backend of Mindprint: transformers and TRL on CUDA and CPU. Start at `plugin.py`."""

import os

# OpenMP's threads otherwise spin long while they wait for one another. On two cores of which another program used one,
# training builtin:tiny made 26 steps in 200 s, and 235 in 40 s without spinning. Spinning briefly keeps most of both:
# alone, SFT steps of a 50M-parameter model took 2.33 s without, 2.15 s this way. torch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# oneDNN, which multiplies bfloat16 on CPUs, keeps prepared kernels for each of 1,024 shapes, in two places, and rows of
# many lengths bring new shapes at every step. 60 SFT steps of a 50M-parameter model took 2,664 MiB and 1.70 s each, and
# 1,027 MiB and 1.55 s this way.
for _limit in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_limit, "48")
