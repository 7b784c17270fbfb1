"""Lets JAX write cuDNN's attention for GPUs that are only described, as it would on these GPUs.

JAX asks for the version of cuDNN, which may not be installed here, and before it writes heads of more than 128 features
also the first GPU of this process for its compute capability. If another version of JAX has moved these questions,
`answer_for_described` returns False, and attention on described GPUs stays with XLA; `tests/models/test_attention.py`
fails if that happens.
"""

import functools
from collections.abc import Callable

_VERSION = 91800
"""A cuDNN that has all that is asked of it, 9.18."""


def answer_for_described(capability_of_traced: Callable[[], float | None]) -> bool:
    """Makes JAX's cuDNN attention take the compute capability of the GPU that a program is traced for, and a new cuDNN
    where there is none.

    Arguments:
        capability_of_traced: That compute capability, such as 9.0. None where JAX can ask the GPU itself.

    Returns whether it could be done. A second call changes nothing.
    """
    try:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        asks_capability, asks_version = cudnn.check_compute_capability, cudnn.check_cudnn_version
    except (ImportError, AttributeError):
        return False

    @functools.wraps(asks_capability)
    def capability(needed: str) -> bool:
        traced = capability_of_traced()
        return asks_capability(needed) if traced is None else traced >= float(needed)

    @functools.wraps(asks_version)
    def version() -> int:
        try:
            return asks_version()
        except RuntimeError:  # there is no cuDNN
            if capability_of_traced() is None:
                raise
            return _VERSION

    if not hasattr(asks_capability, "__wrapped__"):
        cudnn.check_compute_capability = capability
    if not hasattr(asks_version, "__wrapped__"):
        cudnn.check_cudnn_version = version
    return True
