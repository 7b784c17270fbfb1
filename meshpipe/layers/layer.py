"""The user's layers, NNX modules, as pure functions of flat dictionaries keyed by leaf path."""

import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from meshpipe.compiler.fingerprint import fingerprint
from meshpipe.layers.fields import (
    RNGS,
    LayerCall,
)
from meshpipe.layers.modes import set_mode, told
from meshpipe.layers.paths import join
from meshpipe.layers.sown import Sown, collect, is_sown, sowing
from meshpipe.layers.writes import attributes_of, check_attributes, check_variables, check_written, written

Leaves: TypeAlias = dict[str, jax.Array]
"""Arrays by leaf path, e.g. `layers/3/attention/query/kernel`."""
LayerLike: TypeAlias = nnx.Module | Callable[..., Any] | LayerCall
"""A module, a constructor that takes an `nnx.Rngs` or nothing, or a function of the activation such as `nnx.relu`,
perhaps with how it is called (`with_fields`, `call`, `named`, `reading`); with constructors no process ever holds the
whole model."""

_INITIALISE, _RUN = 0, 1


@dataclass(frozen=True)
class Randomness:
    """What dropout masks and other random draws depend on, besides the path of the layer's random stream."""

    seed: jax.Array
    """Key data of the seed, uint32."""
    step: jax.Array
    microbatch: jax.Array
    path_hashes: Mapping[str, jax.Array] = field(default_factory=dict)
    """Hashes by stream path, where they are inputs of a program; a path without one is a constant in the program."""


class Origin:
    """Where a layer's initial values come from: a constructor, or a ready-made module that has values."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], values: Leaves | None):
        self._found: tuple[Callable[[nnx.Rngs], nnx.Module], Leaves | None] | None = make, values

    def get(self) -> tuple[Callable[[nnx.Rngs], nnx.Module], Leaves | None]:
        assert self._found is not None, "the layer's first values were let go of"
        return self._found

    def release(self) -> None:
        """Releases the module: its arrays are whole, on the device where the user made them."""
        self._found = None


@dataclass(frozen=True)
class Layer:
    """One layer without its values: structure, the shape and logical axes of every leaf, and what its call takes."""

    path: str
    graphdef: nnx.GraphDef
    structure: nnx.State
    """Abstract variables of the whole module, in NNX's own form."""
    params: Mapping[str, jax.ShapeDtypeStruct]
    """The parameters that are trained."""
    state: Mapping[str, jax.ShapeDtypeStruct]
    """Its other values besides random streams: what forward may change (batch statistics, caches), and parameters that
    are not trained."""
    axes: Mapping[str, tuple[str | None, ...]]
    """Logical axes of the leaves that name them."""
    fields: Mapping[str, str]
    """The batch field or named output that the call gets, by keyword."""
    optional: tuple[str, ...]
    """Those of these keywords that have a default and were not asked for with `with_fields`."""
    modes: tuple[str, ...]
    """Keywords that tell the call whether it is training."""
    pinned: tuple[str, ...]
    """Attributes that fix parts of the layer in evaluation mode, e.g. `layers/3/norm.use_running_average`."""
    streams: tuple[str, ...]
    """Paths of its random streams."""
    draws: bool
    """Whether its call gets `rngs`, a random stream of its own."""
    origin: Origin
    function: Callable[..., Any] | None = None
    """Calls the module, in place of its own call; see `meshpipe.call`."""
    name: str | None = None
    """Of its output; see `meshpipe.named`."""
    input: str | None = None
    """The batch field or named output that it is called with; None is the output of the layer before it, or the input
    of the model."""
    sows: tuple[tuple[str, str], ...] = ()
    """What it sows and others read: the name, and the name under which it is sown; see `meshpipe.sows`."""
    frozen: frozenset[str] = frozenset()
    """The leaves of `state` that are parameters which are not trained."""
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Leaves whose variable several layers hold, each with all the paths of that variable."""
    once: tuple[str, ...] = ()
    """Paths of its modules with a method `after_step`, which runs once per step."""

    @property
    def make(self) -> Callable[[nnx.Rngs], nnx.Module]:
        return self.origin.get()[0]

    @property
    def values(self) -> Leaves | None:
        """The values of a ready-made module; None where a constructor makes them."""
        return self.origin.get()[1]

    @property
    def all_params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters, trained or not."""
        return {**self.params, **{path: self.state[path] for path in self.state if path in self.frozen}}

    @property
    def own_state(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The values that are no parameters."""
        return {path: leaf for path, leaf in self.state.items() if path not in self.frozen}

    def freezing(self, paths: frozenset[str]) -> "Layer":
        """The layer with these of its parameters frozen."""
        params, own_state = self.all_params, self.own_state
        return replace(
            self,
            params={path: leaf for path, leaf in params.items() if path not in paths},
            state={path: leaf for path, leaf in params.items() if path in paths} | own_state,
            frozen=paths.intersection(params),
        )

    @property
    def class_name(self) -> str:
        root: Any = self.graphdef.nodes[0]
        return root.type.__name__

    @property
    def has_randomness(self) -> bool:
        return bool(self.streams)

    @cached_property
    def kind(self) -> Hashable:
        """A key that is equal for layers that differ only in path and values, so that they can share a trace."""
        variables = nnx.to_flat_state(self.structure)
        metadata = [v.get_metadata() if isinstance(v, nnx.Variable) else None for _, v in variables]
        arrays = [(key, type(v), value_of(v).shape, value_of(v).dtype) for key, v in variables]
        shared, frozen = (
            sorted(path.removeprefix(self.path) for path in paths) for paths in (self.shared, self.frozen)
        )
        return fingerprint(
            (self.graphdef, metadata, dict(self.fields), self.function, self.modes, self.draws, shared, frozen)
        ), tuple(arrays)

    def initialise(self, seed: jax.Array, path_hash: jax.Array) -> tuple[Leaves, Leaves]:
        """Parameters and state from the seed's key and `path_hash` only.

        To be traced under `jit`, where it allocates nothing.
        """
        key = first_key(seed, path_hash)
        with nnx.use_eager_sharding(False):
            leaves = leaves_of(self.path, nnx.state(self.make(nnx.Rngs(key)), graph=True))
        return {p: leaves[p] for p in self.params}, {p: leaves[p] for p in self.state}

    def __call__(
        self,
        params: Mapping[str, jax.Array],
        state: Mapping[str, jax.Array],
        activation: Any,
        keywords: Mapping[str, Any],
        randomness: Randomness,
        *,
        train: bool,
    ) -> tuple[Any, Leaves, Sown]:
        """The output of the layer, its state afterwards, and what it sowed. `keywords` has the values of `fields`.

        Raises `ValueError` when the call changes what would be lost: parameters, attributes, new variables.
        """

        def call(module: nnx.Module) -> Any:
            further: dict[str, Any] = dict(told(module, self.modes, train))
            if self.draws:
                further[RNGS] = nnx.Rngs(_stream_key(stream_of_call(self.path), randomness))
            called = module if self.function is None else partial(self.function, module)
            with sowing():
                return called(activation, **{keyword: keywords[keyword] for keyword in self.fields}, **further)

        values: dict[str, Any] = {**{p: params[p] for p in self.params}, **{p: state[p] for p in self.state}}
        output, after = self.run(call, values, randomness, train=train)
        sown = {path: variable for path, variable in after.items() if path not in values and is_sown(variable)}
        return output, {path: value_of(after[path]) for path in self.state}, collect(self.title, sown)

    def run(
        self,
        call: Callable[[Any], Any],
        values: Mapping[str, Any],
        randomness: Randomness,
        *,
        train: bool,
        method: str = "__call__",
    ) -> tuple[Any, dict[str, Any]]:
        """What `call` returns for the module with these values, and the module's variables afterwards.

        Raises `ValueError` when the call changes what would be lost; `method` is its name there.
        """

        def run(module: nnx.Module) -> tuple[Any, dict[str, Any]]:
            output = call(module)
            return output, {join(self.path, key): v for key, v in nnx.to_flat_state(nnx.state(module, graph=True))}

        def retrace(values_now: list[Any], paths: Sequence[str]) -> list[Any]:
            _, after = run(self.module({**values, **dict(zip(paths, values_now, strict=True))}, randomness, train))
            return [value_of(after[path]) for path in paths]

        module = self.module(values, randomness, train)
        attributes = attributes_of(self.path, module)
        output, after = run(module)
        check_variables(self.title, values, self._random_leaves, after, method)
        check_attributes(self.title, attributes, attributes_of(self.path, module), method)
        params_of = {*self.params, *self.frozen}
        shared_state = {path: group for path, group in self.shared.items() if path not in params_of}
        kept = {path: value for path, value in values.items() if path in params_of or path in shared_state}
        check_written(self.title, written(kept, after, retrace), shared_state, method)
        return output, after

    @property
    def title(self) -> str:
        """How errors name it."""
        return f"{self.path} ({self.class_name})"

    @property
    def _random_leaves(self) -> frozenset[str]:
        flat = nnx.to_flat_state(self.structure)
        return frozenset(join(self.path, key) for key, variable in flat if isinstance(variable, nnx.RngState))

    def module(
        self,
        values: Mapping[str, jax.Array],
        randomness: Randomness,
        train: bool,
        shared: Mapping[str, nnx.Variable[Any]] | None = None,
    ) -> nnx.Module:
        """The module with these values and this mode, with its random streams at the beginning of a microbatch.

        `shared` has variables, by path, that stand in other modules too.
        """
        variables: list[tuple[Any, Any]] = []
        for key, variable in nnx.to_flat_state(self.structure):
            path = join(self.path, key)
            if shared is not None and path in shared:
                variables.append((key, shared[path]))
                continue
            random = isinstance(variable, nnx.RngState)
            value = _random_state(path, variable, randomness) if random else values[path]
            variables.append((key, variable.replace(value) if isinstance(variable, nnx.Variable) else value))
        module = nnx.merge(self.graphdef, nnx.from_flat_state(variables))
        set_mode(module, train)
        return module


def first_key(seed: jax.Array, path_hash: jax.Array | int) -> jax.Array:
    """The key that the first values of a layer are drawn from."""
    return jax.random.fold_in(jax.random.fold_in(seed, _INITIALISE), path_hash)


def _random_state(path: str, variable: nnx.Variable, randomness: Randomness) -> jax.Array:
    """Streams begin anew in every microbatch, from a key of seed, path, step and microbatch.

    So recomputation draws the same.
    """
    abstract = variable.get_value()
    if not isinstance(variable, nnx.RngKey):
        return jnp.zeros(abstract.shape, abstract.dtype)
    key = _stream_key(path, randomness)
    return jax.random.split(key, abstract.shape) if abstract.shape else key


def _stream_key(path: str, randomness: Randomness) -> jax.Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(randomness.seed), _RUN)
    hashed = randomness.path_hashes.get(path, path_hash(path))
    for data in (hashed, randomness.step, randomness.microbatch):
        key = jax.random.fold_in(key, data)
    return key


def stream_of_call(path: str) -> str:
    """The path of the random stream that a layer's call gets; no variable can have it."""
    return f"{path}()"


def leaves_of(path: str, state: nnx.State) -> Leaves:
    flat = nnx.to_flat_state(state)
    return {join(path, key): value_of(v) for key, v in flat if not isinstance(v, nnx.RngState)}


def value_of(variable: Any) -> Any:
    """The array of a variable; an array that is an attribute of its own (`nnx.data`) stands for itself."""
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def path_hash(path: str) -> int:
    """A hash of a leaf path for random keys, of 32 bits; the same in every process and version."""
    return zlib.crc32(path.encode())
