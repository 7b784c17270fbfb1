"""The names of the files and folders of a checkpoint."""

CHECKPOINTS = "checkpoints"
"""Folder of all steps in the folder of a run."""
META = "meta"
"""Folder of the JSON document of a step; one of Orbax's items."""
DOCUMENT = f"{META}/metadata"
CHECKSUMS = "checksums.json"
ZARRAY = ".zarray"
"""In the folder of a leaf: its shape, dtype and chunks."""
MAX_NAME = 255
"""Bytes that a name may have on the usual file systems."""


def directory_name(key: str) -> str:
    """The name of a leaf's folder: `params/layers/0/kernel` is in `params.layers.0.kernel`.

    Orbax takes "/" for levels of folders.
    """
    return key.replace("%", "%25").replace(".", "%2E").replace("/", ".")


def leaf_of(name: str) -> str | None:
    """The leaf that a file of a checkpoint belongs to, from the file's name; None for files of no leaf."""
    parts = name.split("/")
    if len(parts) < 3 or not parts[0].startswith("stage_"):
        return None
    return parts[1].replace(".", "/").replace("%2E", ".").replace("%25", "%")


def name_problem(key: str, longest: int = MAX_NAME) -> str | None:
    """Why no folder can have the name of a leaf, or None."""
    if "\0" in key:
        return "must have no NUL character"
    try:
        size = len(directory_name(key).encode())
    except UnicodeEncodeError:
        return "must be text that UTF-8 can encode"
    if size > longest:
        return f"must have at most {longest} bytes, since it names a folder; it has {size}"
    return None
