"""Names that the results of steps and evaluations have, and the lines of a metrics file. Imports no JAX."""

RESERVED = frozenset(
    {
        *("loss", "weight", "grad_norm", "learning_rate", "step", "event", "time", "eval_time_s", "step_time_s"),
        *("examples_per_s", "tokens_per_s", "tokens_per_s_per_device", "tokens_seen", "model_flops_per_s_per_device"),
        *("model_flops_utilisation", "peak_memory_bytes", "peak_host_memory_bytes", "data_wait_share"),
        *("bubble_fraction", "left_out"),
    }
)
"""Names that metrics, and what layers sow for the loss or the metrics, must not have."""
