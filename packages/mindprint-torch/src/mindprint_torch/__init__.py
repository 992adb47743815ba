"""The PyTorch backend of Mindprint: transformers, PEFT and TRL on CUDA and CPU. Start at `plugin.py`."""

import os

# OpenMP's threads otherwise spin while they wait for one another: on two cores of which another program used one,
# training builtin:tiny made 26 steps in 200 s, and this way 235 in 40 s. It must be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
