"""Eight virtual CPU devices for every test, taken before JAX starts.

Nothing of meshpipe may be imported here: jaxtyping's hook, which checks shapes and types under pytest, starts later.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA sizes its thread pool from NPROC; fewer than twice the devices can deadlock programs with collectives (jax 0.10).
os.environ.setdefault("NPROC", "16")

import jax

jax.config.update("jax_num_cpu_devices", 8)
