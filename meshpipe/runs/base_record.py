"""Whether a run saves its base, and where it had that from if not."""

from pathlib import Path

from meshpipe.checkpoint.base import Base
from meshpipe.config import Config
from meshpipe.errors import ArgumentError
from meshpipe.layers.shared import FACTORS
from meshpipe.layers.staged_model import StagedModel
from meshpipe.runs.start import Start
from meshpipe.trainer import Trainer


def saves_base(config: Config, model: StagedModel, start: Start | None) -> bool:
    """Whether checkpoints hold the parameters that are not trained. Raises `ArgumentError` for a run that has saved
    them so far and is not to any more: its base would go with its oldest checkpoint.
    """
    what = config.checkpoint.checkpoint_what
    if not any(stage.frozen for stage in model.parameters) or what == "all":
        return True
    if start is not None and start.is_own and start.left_out_base is None:
        if what == "trained":
            raise ArgumentError(
                "`checkpoint_what` must stay as it was while the base of a run is in its own folder, whose old "
                f"steps are removed. Got trained, and step {start.step} of {start.folder} holds all. Pass all, or "
                "begin a run in another folder with `init_from`."
            )
        return True
    adapters = any(path.endswith(FACTORS) for stage in model.parameters for path in stage.params)
    return what == "auto" and not adapters


def base_record(trainer: Trainer, start: Start | None) -> Base:
    """What checkpoints say of the base that they leave out."""
    digest = trainer.base_digest()
    source = start if start is None or start.left_out_base is None else start.base
    if source is None:
        return Base(digest=digest, seed=trainer.seed)
    return Base(
        digest=digest,
        folder=str(Path(source.folder).expanduser().absolute()),
        step=None if source.published is not None else source.step,
    )
