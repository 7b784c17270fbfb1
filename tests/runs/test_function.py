"""`meshpipe.run`: the command `train` as a Python function."""

import gc
import json
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_recipes
from flax import nnx
from waiting import wait_until

import meshpipe
from meshpipe import Config, NonFiniteError
from meshpipe.checkpoint import CheckpointConfig
from meshpipe.report import phases


def tiny(**changes: Any) -> Config:
    return replace(tiny_recipes.single(), **changes)


def settings() -> tuple[Any, ...]:
    """What belongs to the process."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    return *handlers, signal.set_wakeup_fd(-1), gc.isenabled(), dict(os.environ), jax.config.jax_num_cpu_devices


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run")
    config = tiny(
        eval_every=4,
        eval_batches=9,
        batch_size=12,
        metrics=str(folder / "metrics.jsonl"),
        checkpoint=CheckpointConfig(checkpoint_dir=str(folder / "checkpoints")),
    )
    before = settings()
    result = meshpipe.run(config, name=f"{tiny_recipes.__file__}:single", show=False)
    assert settings() == before
    return config, result


def test_a_result_has_the_numbers_of_the_run(saved: Any) -> None:
    config, result = saved
    assert (result.status, result.step) == ("completed", 6)
    lines = [json.loads(line) for line in Path(config.metrics).read_text().splitlines()]
    steps = {line["step"]: line["loss"] for line in lines if line["event"] == "step"}
    assert dict(result.losses) == steps
    assert list(steps) == [1, 2, 3, 4, 5, 6]
    assert result.values["loss"] == steps[6]
    assert {line["step"]: {"loss": line["loss"]} for line in lines if line["event"] == "eval"} == result.evaluations
    assert repr(result).startswith(f"RunResult(completed after step 6, loss {steps[6]:.4f}, held out loss ")
    assert result._repr_html_().count("<tr>") == 3


def test_what_was_trained_can_be_used_and_loaded(saved: Any) -> None:
    _, result = saved
    modules = meshpipe.load(result.checkpoint, layers="recipe")
    points = np.stack([tiny_recipes.Points(9, 8)[index]["inputs"] for index in range(9)])
    np.testing.assert_allclose(nnx.Sequential(*modules)(points), result.trainer.predict({"inputs": points}), atol=1e-6)


def test_an_evaluation_covers_every_example_of_the_held_out_data_once(saved: Any) -> None:
    """64 points in batches of 12: five, and one of 4."""
    config, result = saved
    source = config.data.eval_source()
    points = {name: np.stack([source[i][name] for i in range(64)]) for name in ("inputs", "labels")}
    total, weight = config.model.loss(result.trainer.predict(points), points)
    assert result.evaluations[6]["loss"] == pytest.approx(float(total) / float(weight), rel=64 * 2**-23)


def test_a_run_whose_last_step_is_saved_has_nothing_left_to_do(saved: Any) -> None:
    config, _ = saved
    again = replace(config, checkpoint=replace(config.checkpoint, resume=True))
    result = meshpipe.run(again, show=False)
    assert (result.status, result.step, result.trainer, dict(result.losses)) == ("completed", 6, None, {})
    longer = meshpipe.run(replace(again, steps=8), show=False)
    assert list(longer.losses) == [7, 8]


def test_several_runs_of_a_process_are_independent_and_leave_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (meshpipe.run(tiny(eval_batches=0, steps=2), show=False) for _ in range(2))
    assert dict(first.losses) == dict(second.losses)
    assert capsys.readouterr() == ("", "")
    trainer = weakref.ref(first.trainer)
    del first

    def is_gone() -> bool:
        gc.collect()
        return trainer() is None

    wait_until(is_gone)  # threads may hold it for a moment


def test_phases_and_progress_are_shown_unless_they_are_not_to_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "QUIET_SECONDS", 0.0)
    meshpipe.run(tiny(eval_batches=0, steps=2))
    shown = capsys.readouterr().out
    assert "Compiling" in shown
    assert "step 2/2  loss" in shown


def test_failures_are_raised_with_what_was_saved(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NonFiniteError, match="is not finite") as caught:
        meshpipe.run(tiny(data=tiny_recipes.PointsConfig(poisoned=3, count=32), eval_batches=0), show=False)
    assert "Nothing was saved." in caught.value.__notes__[-1]
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="`batch_size`"):
        meshpipe.run(tiny(data=tiny_recipes.PointsConfig(count=3)), show=False)


def when_a_step_is_done(metrics: str, action: Callable[[], object]) -> None:
    """Calls `action` in another thread once the metrics file has the second step."""

    def wait() -> None:
        while not os.path.exists(metrics) or b'"step": 2' not in Path(metrics).read_bytes():
            time.sleep(0.05)
        action()

    threading.Thread(target=wait, daemon=True).start()


def endless(folder: Path) -> Config:
    checkpoint = CheckpointConfig(checkpoint_dir=str(folder / "checkpoints"))
    data = tiny_recipes.PointsConfig(seconds=0.02)
    return tiny(data=data, steps=10_000, metrics=str(folder / "metrics.jsonl"), checkpoint=checkpoint)


@pytest.fixture
def without_callbacks_of_gc() -> Iterator[None]:
    """JAX and Hypothesis have such; Python drops an interrupt that arrives inside of one."""
    callbacks = gc.callbacks[:]
    gc.callbacks.clear()
    yield
    gc.callbacks[:] = callbacks


@pytest.mark.usefixtures("without_callbacks_of_gc")
def test_an_interrupt_is_the_caller_s(tmp_path: Path) -> None:
    config = endless(tmp_path)
    main = threading.main_thread().ident
    assert main is not None
    when_a_step_is_done(config.metrics or "", lambda: signal.pthread_kill(main, signal.SIGINT))
    before = settings()
    with pytest.raises(KeyboardInterrupt):
        meshpipe.run(config, show=False)
    assert settings() == before
    last = json.loads(Path(config.metrics or "").read_text().splitlines()[-1])
    assert (last["event"], last["status"], last["saved_step"]) == ("end", "stopped", None)


def test_signals_stop_a_run_that_handles_them(tmp_path: Path) -> None:
    config = endless(tmp_path)
    when_a_step_is_done(config.metrics or "", lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = settings()
    result = meshpipe.run(config, show=False, handle_signals=True)
    assert settings() == before
    assert result.status == "stopped"
    assert 2 <= result.step < 10_000
    assert meshpipe.Checkpointer(result.checkpoint).latest() == result.step


def test_other_threads_can_run_but_not_handle_signals() -> None:
    found: list[Any] = []

    def work() -> None:
        found.append(meshpipe.run(tiny(eval_batches=0, steps=1), show=False).step)
        try:
            meshpipe.run(tiny(), handle_signals=True)
        except ValueError as error:
            found.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert found == [1, "Python handles signals in the main thread alone. Leave `handle_signals` out elsewhere."]
