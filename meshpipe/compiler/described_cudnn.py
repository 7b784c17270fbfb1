"""Lets JAX write cuDNN's attention for GPUs that are only described, as it would on these GPUs.

JAX asks the first GPU of this process for its compute capability before it writes heads of more than 128 features. If
another version of JAX has moved that question, `answer_for_described` returns False, and attention on described GPUs
stays with XLA; `tests/models/test_attention.py` fails if that happens.
"""

import functools
from collections.abc import Callable


def answer_for_described(capability_of_traced: Callable[[], float | None]) -> bool:
    """Makes JAX's cuDNN attention take the compute capability of the GPU that a program is traced for.

    Arguments:
        capability_of_traced: That compute capability, such as 9.0. None where JAX can ask the GPU itself.

    Returns whether it could be done. A second call changes nothing.
    """
    try:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        asks = cudnn.check_compute_capability
    except (ImportError, AttributeError):
        return False
    if not hasattr(asks, "__wrapped__"):

        @functools.wraps(asks)
        def answer(needed: str) -> bool:
            capability = capability_of_traced()
            return asks(needed) if capability is None else capability >= float(needed)

        cudnn.check_compute_capability = answer
    return True
