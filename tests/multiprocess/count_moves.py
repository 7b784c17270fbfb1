"""Counts what moves between this process and the other in a step, and prints it beside what the program says."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from member import join_run, place_parser

import meshpipe
from meshpipe.pipeline import transfer
from meshpipe.pipeline.peers import Peers
from meshpipe.pipeline.pulls import Pulls
from meshpipe.plan.lower import Transfer
from meshpipe.processes.coordination import barrier
from meshpipe.processes.guard import leave
from meshpipe.processes.launch import free_port
from meshpipe.sharding import local_value

WIDTH, ROWS, MICROBATCHES = 4, 8, 4


class Pair(nnx.Module):
    """Two arrays in, two arrays out."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        first, second = x if isinstance(x, tuple) else (x, x)
        first = jnp.tanh(self.linear(first))
        return first, second + first


class Join(Pair):
    def __call__(self, x: Any, early: Any) -> Any:
        first, second = super().__call__(x)
        return first * early[0], second + early[1]


def layers() -> list[Any]:
    """One per stage. The output of the first is read by the second and the fourth, which share a rank."""
    return [meshpipe.named("early", Pair), Pair, Pair, Join]


def loss(output: Any, batch: Any) -> Any:
    return ((output[0] + output[1]) ** 2).sum(), output[0].shape[0]


def counted_native() -> list[int]:
    """The numbers of arrays of every copy that `jax.device_put` asks XLA for between processes, from now on.

    CPU devices have no transport of their own, so JAX's transfer server, which serves every platform, stands in.
    """
    from jax._src import dispatch

    transfer.way_between_processes = lambda: "native"
    copies: list[int] = []
    copy = dispatch.xc.batched_copy_array_to_devices_with_sharding

    def counting(arrays: Any, *rest: Any) -> Any:
        copies.append(len(arrays))
        return copy(arrays, *rest)

    dispatch.xc.batched_copy_array_to_devices_with_sharding = counting
    return copies


def counted_sends(carrier: type[Any]) -> list[int]:
    """The numbers of arrays of every message that this process sends, or offers, from now on."""
    messages: list[int] = []
    send = carrier.send

    def counting(self: Any, process: int, number: int, arrays: Any) -> None:
        messages.append(len(arrays))
        send(self, process, number, arrays)

    carrier.send = counting
    return messages


def main() -> None:
    parser = place_parser()
    parser.add_argument("--native", action="store_true")
    flags = parser.parse_args()
    if flags.native:
        jax.config.update("jax_cross_host_transfer_socket_address", f"127.0.0.1:{free_port()}")
        jax.config.update("jax_cross_host_transport_addresses", "127.0.0.1:0")
    join_run(flags, 2 // (flags.process_count or 1))
    counts = counted_native() if flags.native else counted_sends(Pulls if flags.transfers == "server" else Peers)
    batch = {"inputs": np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)}
    trainer = meshpipe.Trainer(
        layers(),
        loss,
        optax.sgd(0.01),
        batch=batch,
        mesh=meshpipe.make_mesh(2),
        pipeline=meshpipe.PipelineConfig(num_microbatches=MICROBATCHES, schedule="interleaved-1f1b", stages_per_rank=2),
    )
    losses = [float(local_value(trainer.step(batch).loss)).hex()]
    before = len(counts)
    losses.append(float(local_value(trainer.step(batch).loss)).hex())
    moves = [instruction for instruction in trainer.model.lowered.instructions if isinstance(instruction, Transfer)]
    sent = [sum(move.source_rank == rank for move in moves) for rank in range(2)]
    print("RESULT", json.dumps({"losses": losses, "counts": counts[before:], "sent": sent}), flush=True)
    if jax.process_count() > 1:
        barrier("counted", 60.0)  # what the other has not fetched yet is lost when this process ends
        leave(0)


if __name__ == "__main__":
    main()
