"""Wrong inputs to the library, as users make them. Run as a program, without the checks of types that tests have.

Prints, as JSON by name, what each raises: its type, and its message with the notes.
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec

import meshpipe

ROWS = {"inputs": np.ones((8, 4), np.float32), "y": np.zeros((8, 4), np.float32)}
TENSOR_ONLY = meshpipe.ShardingRules(rules={"heads": "tensor"})


def dense(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Linear(4, 4, rngs=rngs)


def loss(output: Any, batch: Any) -> Any:
    return (output**2).sum(), output.size


def train(layers: Any = (dense, dense), **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "loss": loss,
        "optimizer": optax.sgd(0.1),
        "batch": ROWS,
        "mesh": meshpipe.make_mesh(2),
        "pipeline": meshpipe.PipelineConfig(num_microbatches=2),
    }
    arguments |= changes
    return meshpipe.Trainer(layers, arguments.pop("loss"), arguments.pop("optimizer"), **arguments)


@functools.cache
def trained() -> meshpipe.Trainer:
    return train()


def called(call: Callable[..., Any]) -> Callable[[], Any]:
    """A second layer that is called so."""
    return lambda: train([dense, call])


def named(*axes: str) -> Callable[[nnx.Rngs], nnx.Module]:
    init = nnx.with_partitioning(nnx.initializers.ones, axes)
    return lambda rngs: nnx.Linear(4, 4, kernel_init=init, rngs=rngs)


class Branches(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x if x.sum() > 0 else -x


class Norm(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(4, axis_name="data", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x)


class Placed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x, out_sharding=PartitionSpec("data", "tensor"))


class NeedsTemperature(nnx.Module):
    def __call__(self, x: jax.Array, temperature: jax.Array) -> jax.Array:
        return x * temperature


class Scheduled(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        raise RuntimeError("not on Tuesdays")


def explicit(kind: AxisType) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 1, 1), ("pipeline", "data", "tensor"), axis_types=(kind,) * 3)


def by_key(x: Any) -> Any:
    return x["hidden"]


def narrow(x: jax.Array) -> jax.Array:
    return x[:, :3]


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    # The list of layers.
    "one module": (
        lambda: train(nnx.Sequential(dense(nnx.Rngs(0)), nnx.relu)),
        r"list: .* Got one Sequential. Pass list\(model.layers\)",
    ),
    "a class": (lambda: train(nnx.Linear), r"Got the class Linear. Pass its parts"),
    "a constructor": (lambda: train(dense), r"Got one function. Pass its parts"),
    "a generator": (lambda: train(x for x in [dense]), r"Got one generator"),
    "nothing": (lambda: train([]), r"A model needs at least one layer"),
    "a number": (lambda: train([dense, 3]), r"layers/1 is an int. For a constructor write"),
    "too few": (lambda: train([dense]), r"Every stage needs a layer. Got 1 layer for 2 stages"),
    "class with arguments": (lambda: train([dense, nnx.Linear]), r"layers/1 \(Linear\) requires in_features, out_fea"),
    "the name last": (lambda: meshpipe.named(dense, "memory"), r"named takes a name, then a layer. Got a function as"),
    "number to read": (lambda: train([dense, meshpipe.reading(1, dense)]), r"reading takes a name.* Got an int as the"),
    # Layers that fail.
    "branch on a value": (
        called(Branches),
        r"TracerBool.*layers/1 \(Branches, stage 1\), called with float32\[4, 4\] in",
    ),
    "bound axis": (
        called(Norm),
        r"NameError.*layers/1 \(Norm, stage 1\).* Leave axis_name out: a layer sees the whole",
    ),
    "shapes": (
        called(lambda rngs: nnx.Linear(3, 4, rngs=rngs)),
        r"layers/1 \(Linear.* Each layer must take what the o",
    ),
    "own error": (
        called(Scheduled),
        r"RuntimeError: not on Tuesdays\nThis comes from layers/1 \(Scheduled, stage 1\), cal",
    ),
    "key": (called(by_key), r"This comes from layers/1 \(by_key, stage 1\), called with float32\[4, 4\] in training."),
    "returns a text": (called(lambda x: "x"), r"A layer must return arrays.* layers/1 \(<lambda>\) returned a str."),
    "numpy": (
        called(lambda x: np.asarray(x)),
        r"TracerArray.* keep arrays as arrays, without float, int, bool or numpy",
    ),
    "missing field": (called(NeedsTemperature), r"requires 'temperature'; the batch has inputs, y. Add the field"),
    # Loss and metrics.
    "loss that is none": (lambda: train(loss="mse"), r"`loss` must be a function .* Got a str."),
    "loss of one value": (
        lambda: train(loss=lambda o, b: o.mean()),
        r"A loss must return two scalars.* Got float32\[\]. W",
    ),
    "loss of arrays": (lambda: train(loss=lambda o, b: (o, o.size)), r"A loss must return two scalars"),
    "complex loss": (lambda: train(loss=lambda o, b: ((o * 1j).sum(), 1)), r"A loss and its weight must be real"),
    "loss of one argument": (
        lambda: train(loss=lambda o: o),
        r"TypeError.*\nThis comes from the loss, called with the ou",
    ),
    "loss of a missing field": (
        lambda: train(loss=lambda o, b: (b["labels"], 1)),
        r"KeyError: 'labels'\nThis comes from the loss, .* a microbatch with \{inputs: float32\[4, 4\], y: float32",
    ),
    "metrics of one value": (
        lambda: train(metrics=lambda o, b: {"mean": o.mean()}).evaluate([ROWS]),
        r"Metrics must return a dict with a pair of scalars by name",
    ),
    "metrics that fail": (
        lambda: train(metrics=lambda o, b: {"a": b["labels"]}).evaluate([ROWS]),
        r"KeyError: 'labels'\nThis comes from the metrics",
    ),
    "metrics that are none": (lambda: train(metrics={"a": 1}), r"`metrics` must be a function"),
    # The optimizer.
    "optimizer not called": (lambda: train(optimizer=optax.adam), r"Got adam. Call it: adam\(...\)."),
    "optimizer of a class": (lambda: train(optimizer=nnx.Optimizer), r"`optimizer` must be an Optax transformation"),
    "learning rate": (lambda: train(optimizer=0.1), r"Got a float. Pass e.g. optax.adam\(1e-3\)"),
    "optimizer of the whole model": (
        lambda: train(optimizer=optax.contrib.dadapt_adamw(1.0)),
        r"An optimizer must update each parameter from its own gradient.* Got a transformation in which \S+ depends on",
    ),
    "clipping by itself": (
        lambda: train(optimizer=optax.clip_by_global_norm(1.0)),
        r"pass clip_norm=..., which counts",
    ),
    "line search": (lambda: train(optimizer=optax.lbfgs()), r"its update also asks for .*value"),
    "loss as argument": (lambda: train(optimizer=optax.polyak_sgd()), r"its update also asks for 'value'"),
    "loss as argument, one stage": (
        lambda: train(optimizer=optax.polyak_sgd(), mesh=meshpipe.make_mesh(1)),
        r"its update also asks for 'value'",
    ),
    "mask by name": (
        lambda: train(optimizer=optax.masked(optax.sgd(0.1), {"kernel": True})),
        r"An optimizer sees the parameters of one stage at a time",
    ),
    "clip norm 0": (lambda: train(clip_norm=0.0), r"`clip_norm` must be above 0, or None to clip nothing. Got 0.0."),
    "clip norm of a text": (lambda: train(clip_norm="1"), r"`clip_norm` must be above 0.* Got '1', a str."),
    # Seeds, mesh and config.
    "negative seed": (lambda: train(seed=-1), r"`seed` must be at least 0"),
    "long seed": (lambda: train(seed=2**32), r"`seed` must be at least 0 and below 4294967296"),
    "key for a seed": (lambda: train(seed=jax.random.key(0)), r"`seed` must be a whole number"),
    "sizes for a mesh": (lambda: train(mesh=(2, 1, 1)), r"`mesh` must be a jax.sharding.Mesh. Got \(2, 1, 1\)"),
    "config of a mesh": (lambda: train(mesh=meshpipe.MeshConfig(pipeline=2)), r"Pass meshpipe.make_mesh\("),
    "mesh without pipeline": (
        lambda: train(mesh=Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))),
        r"The first mesh axis must be 'pipeline'. Got axes \('data',\)",
    ),
    "explicit mesh": (
        lambda: train(mesh=explicit(AxisType.Explicit)),
        r"Every mesh axis must be AxisType.Auto.* pipeline Explicit, data Explicit, tensor Explicit.* Use meshpipe.",
    ),
    "manual mesh": (lambda: train(mesh=explicit(AxisType.Manual)), r"Got pipeline Manual, data Manual, tensor Manual"),
    "out_sharding": (
        called(Placed),
        r"layers/1 \(Placed, stage 1\), called with .* Leave out_sharding out: the mesh ax",
    ),
    "bool in a mesh": (lambda: meshpipe.make_mesh(pipeline=True), r"`pipeline` must be a whole number of at least 1"),
    "half a device": (
        lambda: meshpipe.make_mesh(tensor=0.5),
        r"`tensor` must be a whole number of at least 1. Got 0.5",
    ),
    "schedule for a config": (lambda: train(pipeline="1f1b"), r"`pipeline` must be a meshpipe.PipelineConfig"),
    "half a microbatch": (
        lambda: meshpipe.PipelineConfig(num_microbatches=2.5),
        r"whole number of at least 1.* Got 2.5.",
    ),
    "true microbatches": (lambda: meshpipe.PipelineConfig(num_microbatches=True), r"at least 1.* Got True, a bool."),
    "no microbatches": (lambda: meshpipe.PipelineConfig(num_microbatches=None), r"Got None, a NoneType."),
    "first layers": (
        lambda: meshpipe.PipelineConfig(partition=(0, 2)),
        r"`partition` must be a string. .* Write '0,2'.",
    ),
    "bytes": (
        lambda: meshpipe.PipelineConfig(remat="auto", memory_limit=800),
        r"`memory_limit` must be a string. .* '800'",
    ),
    "remat": (lambda: meshpipe.PipelineConfig(remat=None), r"`remat` must be a string. Got None, a NoneType."),
    "schedule of a function": (
        lambda: meshpipe.PipelineConfig(schedule=meshpipe.make_plan),
        r"`schedule` must be a string",
    ),
    "warm-up": (
        lambda: meshpipe.OptimizerConfig(warmup_steps=2.5),
        r"`warmup_steps` must be a whole number of at least",
    ),
    "text for a rate": (
        lambda: meshpipe.OptimizerConfig(learning_rate="1e-3"),
        r"`learning_rate` must be a number of at",
    ),
    # Sharding rules and tied leaves.
    "dict of rules": (lambda: train(rules={"heads": "tensor"}), r"`rules` must be meshpipe.ShardingRules"),
    "empty dict of rules": (lambda: train(rules={}), r"`rules` must be meshpipe.ShardingRules"),
    "rule to an unknown mesh axis": (
        lambda: train([named("heads", "embed")] * 2, rules=meshpipe.ShardingRules(rules={"heads": "m", "embed": None})),
        r"A rule must name axes of the mesh.* Got 'heads' -> 'm', and a stage has data, tensor",
    ),
    "foreign axes": (
        lambda: train([named("rows", "columns"), named("mlp", "tensor")], rules=TENSOR_ONLY),
        r"Got 'rows', 'columns', 'mlp'",
    ),
    "rule over data and tensor": (
        lambda: meshpipe.ShardingRules(rules={"heads": ("data", "tensor")}),
        r"Several mesh axes of one rule must be axes other than 'data'",
    ),
    "rule to a number": (lambda: meshpipe.ShardingRules(rules={"heads": 1}), r"Got 'heads' -> 1"),
    "more axes than dims": (lambda: train([named("embed", None, "hidden")] * 2), r"A leaf must have as many dims"),
    "one tied path": (lambda: train(tied=[("layers/0/kernel",)]), r"`tied` must be a list of groups"),
    "tied without groups": (
        lambda: train(tied=("layers/0/kernel", "layers/1/kernel")),
        r"`tied` must be a list of group",
    ),
    "tied text": (lambda: train(tied="layers/0/kernel"), r"`tied` must be a list of groups"),
    "tied and not there": (lambda: train(tied=[("layers/0/w", "layers/1/w")]), r"A tied leaf must be a parameter"),
    # What is trained.
    "trainable number": (lambda: train(trainable=5), r"`trainable` must be patterns .* Got 5, an int. Write e.g."),
    "trainable dict": (lambda: train(trainable={"kernel": True}), r"Got \{'kernel': True\}, a dict"),
    "trainable array": (lambda: train(trainable=np.ones(3)), r"an NNX filter, or a list of these"),
    "trainable list of numbers": (lambda: train(trainable=["kernel", 3]), r"Got 3, an int"),
    "trainable module": (lambda: train(trainable=nnx.Linear), r"Got the class Linear"),
    "trainable state": (lambda: train(trainable=nnx.BatchStat), r"Got BatchStat, which matches none of 4"),
    "trainable layer that is not there": (
        lambda: train(trainable="layers/2"),
        r"matches none of 4. Parameters are lay",
    ),
    "nothing trainable": (lambda: train(trainable=["kernel", "!layers"]), r"leaves none|matches none"),
    "trainable filter of one argument": (lambda: train(trainable=lambda path: True), r"This comes from `trainable`"),
    "half of a tied group trainable": (
        lambda: train(trainable="layers/1", tied=[("layers/0/kernel", "layers/1/kernel")]),
        r"all or none of them must be trained.*Name both or neither",
    ),
    "groups text": (
        lambda: meshpipe.OptimizerConfig(groups="bias:weight_decay=0"),
        r"`groups` must be a tuple of meshpipe.ParameterGroup",
    ),
    "groups dict": (lambda: meshpipe.OptimizerConfig(groups=({"pattern": "bias"},)), r"`groups` must be a tuple"),
    "group with another optimizer": (
        lambda: meshpipe.OptimizerConfig(groups=("bias:optimizer=lion",)),
        r"must be adamw or sgd. Got 'lion' for 'bias'",
    ),
    # Batches.
    "loader for a batch": (
        lambda: train(batch=iter([ROWS])),
        r"`batch` must be a dict .* Pass one of its batches: next\(",
    ),
    "pair for a batch": (lambda: train(batch=(1, 2)), r"`batch` must be a dict of arrays"),
    "nested batch": (
        lambda: train(batch={"inputs": ROWS}),
        r"must be a flat dict of arrays. 'inputs' is a dict",
    ),
    "texts in a batch": (lambda: train(batch=ROWS | {"t": np.array(["a"] * 8)}), r"Got 't' of dtype <U1"),
    "numbers for names": (
        lambda: train(batch=ROWS | {1: ROWS["y"]}),
        r"The fields of a batch must have names.* Got 1.",
    ),
    "no inputs": (lambda: train(batch={"x": ROWS["y"]}), r"`input` must name a field .* Got 'inputs'; the batch has x"),
    "one temperature": (
        lambda: train(batch=ROWS | {"t": np.float32(1)}),
        r"leading dim.* 't' has none: repeat its value for every example",
    ),
    "rows that do not divide": (
        lambda: train(pipeline=meshpipe.PipelineConfig(num_microbatches=3)),
        r"The batch size must be a multiple of num_microbatches \* data",
    ),
    # Steps.
    "another dtype": (
        lambda: trained().step(ROWS | {"inputs": ROWS["inputs"].astype(np.float16)}),
        r"Got 'inputs' of dtype float16, and float32 in the example. Convert it",
    ),
    "integers": (
        lambda: trained().step(ROWS | {"y": ROWS["y"].astype(int)}),
        r"Got 'y' of dtype int64, and float32",
    ),
    "fewer rows": (lambda: trained().step({k: v[:6] for k, v in ROWS.items()}), r"Drop or pad the last, smaller batch"),
    "a field less": (lambda: trained().step({"inputs": ROWS["inputs"]}), r"fields and shapes of the example batch"),
    "no dict": (lambda: trained().step(ROWS["inputs"]), r"A batch must be a dict of arrays. Got a ndarray."),
    "no batches": (lambda: trained().evaluate([]), r"Evaluation needs at least one batch"),
    "one batch to evaluate": (
        lambda: trained().evaluate(ROWS),
        r"`evaluate` takes batches.* Write evaluate\(\[batch\]\)",
    ),
}


def outcome(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except Exception as error:
        return [type(error).__name__, "\n".join((str(error), *getattr(error, "__notes__", ())))]
    return ["", "nothing"]


if __name__ == "__main__":
    meshpipe.use_cpu_devices(2)
    print(json.dumps({name: outcome(call) for name, (call, _) in CASES.items()}), file=sys.stdout)
