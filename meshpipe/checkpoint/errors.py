"""What a checkpoint can be wrong with."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not fit what is to be restored; the message gives the way out."""


class CheckpointGoneError(CheckpointError):
    """A step is not there, or was removed while it was read, as a run does with those beyond the number that it
    keeps.
    """
