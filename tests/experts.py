"""Layers with mixtures of experts for tests: one adds a balancing term to the loss, one balances by a bias that is
updated once per step.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import meshpipe

WIDTH, EXPERTS, CHOSEN, VOCABULARY = 8, 4, 2, 16


class Embed(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)

    def __call__(self, inputs):
        return self.embed(inputs)


class Experts(nnx.Module):
    """Dense dispatch: every expert computes every token, and the gates of the router weight the results."""

    def __init__(self, rngs):
        self.router = nnx.Linear(WIDTH, EXPERTS, use_bias=False, rngs=rngs)
        self.up = nnx.Param(rngs.params.normal((EXPERTS, WIDTH, WIDTH)) / 3)

    def scores(self, x):
        return nnx.softmax(self.router(x))

    def gates(self, scores, choose_by):
        """What each expert counts for each token, and which of them are chosen."""
        chosen = jax.nn.one_hot(jax.lax.top_k(choose_by, CHOSEN)[1], EXPERTS).sum(-2)
        kept = scores * chosen
        return kept / kept.sum(-1, keepdims=True), chosen

    def mix(self, x, gates):
        return x + nnx.tanh(jnp.einsum("btw,ewv,bte->btv", x, self.up[...], gates))


class BalancedByLoss(Experts):
    """Adds the loss of the Switch Transformer (arXiv 2101.03961, section 2.2) over the microbatch, times its tokens."""

    def __call__(self, x):
        scores = self.scores(x)
        gates, chosen = self.gates(scores, scores)
        balance = EXPERTS * (chosen.mean((0, 1)) * scores.mean((0, 1))).sum() / CHOSEN
        self.sow(meshpipe.LossTerm, "balance", 0.1 * balance * x.shape[0] * x.shape[1])
        self.sow(nnx.Intermediate, "entropy", -(scores * jnp.log(scores)).sum(-1).mean())
        return self.mix(x, gates)


class BalancedByBias(Experts):
    """DeepSeek-V3, arXiv 2412.19437, section 2.1.2: a bias decides which experts are chosen, and not their gates."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.bias = nnx.Variable(jnp.zeros(EXPERTS))
        self.tokens = nnx.Variable(jnp.zeros(EXPERTS, jnp.int32))

    def __call__(self, x):
        scores = self.scores(x)
        gates, chosen = self.gates(scores, scores + self.bias[...])
        self.tokens[...] += chosen.sum((0, 1)).astype(jnp.int32)
        return self.mix(x, gates)

    def after_step(self):
        load = self.tokens[...]
        self.bias[...] += 0.01 * jnp.sign(load.mean() - load)
        self.tokens[...] = jnp.zeros_like(load)


class Head(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


def loss(output, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(output, batch["labels"])
    return (losses * batch["weight"][:, None]).sum(), batch["weight"].sum() * losses.shape[1]


def batches(count, size=16, length=4):
    rng = np.random.default_rng(0)
    return [
        {
            "inputs": (tokens := rng.integers(0, VOCABULARY, (size, length)).astype(np.int32)),
            "labels": (tokens * 3 + 1) % VOCABULARY,
            "weight": np.repeat(np.float32([0, 1, 2, 1]), size // 4),
        }
        for _ in range(count)
    ]
