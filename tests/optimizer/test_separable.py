"""Stages that an optimizer treats alike but for their names, and only those, are found to be of one kind."""

import jax
import jax.numpy as jnp
import optax
import pytest

from meshpipe.optimizer.separable import kinds_of_updates

STAGES = [
    {f"layers/{stage}/{name}": jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in (("w", (4, 4)), ("b", (4,)))}
    for stage in range(3)
]


def by_matrix(params: object) -> object:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def only_the_second(params: dict[str, object]) -> dict[str, bool]:
    return {path: "layers/1/" in path for path in params}


def rate_of_layer(updates: dict[str, jax.Array], state: object, params: object = None) -> tuple[object, object]:
    return {path: u * 0.5 ** int(path.split("/")[1]) for path, u in updates.items()}, state


def state_of_layer(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.full(p.shape, float(path.split("/")[1])) for path, p in params.items()}


def add_state(updates: object, state: object, params: object = None) -> tuple[object, object]:
    return jax.tree.map(jnp.add, updates, state), state


@pytest.mark.parametrize(
    ("transformation", "same"),
    [
        (optax.adamw(1e-3, weight_decay=0.1, mask=by_matrix), [0, 0, 0]),
        (optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(1.0, 0.0, 9)), [0, 0, 0]),
        (optax.adamw(1e-3, weight_decay=0.1, mask=only_the_second), [0, 1, 0]),
        (optax.multi_transform({True: optax.adam(1e-3), False: optax.sgd(0.1)}, only_the_second), [0, 1, 0]),
        (optax.GradientTransformation(lambda params: optax.EmptyState(), rate_of_layer), [0, 1, 2]),
        (optax.GradientTransformation(state_of_layer, add_state), [0, 1, 2]),
    ],
    ids=["mask by shape", "schedule", "mask by name", "label by name", "rate by name", "state by name"],
)
def test_names_count_where_they_matter(transformation: optax.GradientTransformation, same: list[int]) -> None:
    kinds = kinds_of_updates(transformation, STAGES)
    assert [kinds.index(kind) for kind in kinds] == same


def test_what_cannot_be_told_is_of_no_kind() -> None:
    kinds = kinds_of_updates(optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(), STAGES)
    assert kinds == [None] * 3
    assert kinds_of_updates(optax.adam(0.1), STAGES[:1]) == [None]
