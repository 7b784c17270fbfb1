"""Graphs of stages for tests: random ones, and two that models have."""

import random

from meshpipe.plan.graph import Graph, Value


def random_graph(num_stages: int, seed: int) -> Graph:
    """Some stages frozen, some not linked to the next, and some values that stages far away read."""
    chance = random.Random(seed)
    trains = [chance.random() < 0.7 for _ in range(num_stages)]
    if not any(trains):
        trains[chance.randrange(num_stages)] = True
    values = []
    for source in range(num_stages - 1):
        if chance.random() < 0.8:
            values.append(Value("", source, (source + 1,)))
        for index in range(chance.choice([0, 0, 1, 1, 2])):
            later = range(source + 1, num_stages)
            targets = sorted(chance.sample(later, chance.randint(1, min(4, len(later)))))
            values.append(Value(f"v{source}{'ab'[index]}", source, tuple(targets)))
    return Graph(tuple(trains), tuple(values))


def skip() -> Graph:
    """Four stages in a chain; the last also reads the output of the first."""
    return Graph((True,) * 4, (Value("early", 0, (1, 3)), Value("", 1, (2,)), Value("", 2, (3,))))


def encoder_decoder(num_stages: int = 4) -> Graph:
    """Half of the stages encode; every stage of the other half reads the memory, and the first of them the batch."""
    half = num_stages // 2
    encoder = [Value("", stage, (stage + 1,)) for stage in range(half - 1)]
    decoder = [Value("", stage, (stage + 1,)) for stage in range(half, num_stages - 1)]
    memory = Value("memory", half - 1, tuple(range(half, num_stages)))
    return Graph((True,) * num_stages, (*encoder, memory, *decoder))
