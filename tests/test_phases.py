"""Phases tell their listeners what is done, in which part it is, and how long it took."""

import jax.numpy as jnp
import optax
from flax import nnx

import meshpipe
from meshpipe.phases import Phase, each, listening, phase, silence


def test_a_phase_is_told_at_its_beginning_at_each_part_and_at_its_end() -> None:
    heard: list[Phase] = []
    with listening(heard.append), phase("Compiling", "stage", 2) as now:
        now.next()
        now.next()  # in threads, the last part may be done before another
    assert [str(found) for found in heard[:3]] == ["Compiling stage 1 of 2", *["Compiling stage 2 of 2"] * 2]
    assert str(heard[3]) == f"Compiling took {heard[3].seconds:.1f} s"
    assert len({found.key for found in heard}) == 1


def test_a_comma_before_the_part_is_not_at_the_end() -> None:
    heard: list[Phase] = []
    with listening(heard.append):
        list(each("Measuring on cpu (about 4 s),", "layer", [0]))
    assert str(heard[0]) == "Measuring on cpu (about 4 s), layer 1 of 1"
    assert str(heard[-1]).startswith("Measuring on cpu (about 4 s) took 0.")


def test_nobody_hears_a_phase_by_default_or_later() -> None:
    heard: list[Phase] = []
    with listening(heard.append):
        pass
    with phase("Compiling"):
        pass
    with listening(heard.append):
        silence()
        list(each("Tracing", "stage", [1, 2]))
    assert heard == []


def test_a_phase_whose_loop_is_left_has_ended() -> None:
    heard: list[Phase] = []
    with listening(heard.append):
        for item in each("Tracing", "stage", "abc"):
            if item == "b":
                break
    assert heard[-1].seconds is not None
    assert str(heard[-2]) == "Tracing stage 2 of 3"


def test_a_phase_that_was_never_entered_has_no_end() -> None:
    heard: list[Phase] = []
    with listening(heard.append):
        phase("Running").end()
    assert heard == []


def test_a_trainer_tells_what_it_does() -> None:
    heard: list[str] = []
    batch = {"inputs": jnp.ones((4, 3))}
    with meshpipe.listening(lambda phase: heard.append(str(phase))):
        trainer = meshpipe.Trainer(
            [lambda rngs: nnx.Linear(3, 3, rngs=rngs)] * 4,
            lambda output, batch: (output.sum(), jnp.float32(len(output))),
            optax.sgd(0.1),
            batch=batch,
            mesh=meshpipe.make_mesh(4),
        )
        made = len(heard)
        trainer.step(batch)
        assert len(heard) == made  # steps are not phases
        trainer.evaluate([batch])
    for part in ("Examining layer 4 of 4", "Tracing stage 4 of 4", "Compiling kind of stage 1 of 3", "Initialising"):
        assert part in heard[:made]
    assert "Compiling to evaluate, kind of stage 1 of 3" in heard[made:]
