"""Eight virtual CPU devices for every test, taken before JAX starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA sizes its thread pool from NPROC; fewer than twice the devices can deadlock programs with collectives (jax 0.10).
os.environ.setdefault("NPROC", "16")

import jax

# Not by an environment variable: commands that tests start have to take their own devices.
jax.config.update("jax_num_cpu_devices", 8)
