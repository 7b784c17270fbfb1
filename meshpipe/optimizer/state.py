"""The shapes of Optax's state, and where it lives."""

from typing import Any

import jax
import optax

from meshpipe.optimizer.parameters import StageParameters
from meshpipe.optimizer.separable import start_of_optimizer
from meshpipe.sharding import abstract, replicated


def state_shapes(transformation: optax.GradientTransformation, stage: StageParameters) -> Any:
    """Optax's state of a stage, its parameter-like leaves placed like the parameters; nothing is allocated.

    Raises `ValueError` for a transformation that cannot start from the parameters of one stage.
    """
    owned, everywhere = stage.owned, replicated(stage.mesh)

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        params = [owned[key.key] for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in owned]
        like = [param.sharding for param in params if param.shape == leaf.shape]
        return abstract(leaf.shape, leaf.dtype, like[0] if like else everywhere)

    with start_of_optimizer(owned):
        shapes = jax.eval_shape(transformation.init, owned)
    return jax.tree_util.tree_map_with_path(place, shapes)
