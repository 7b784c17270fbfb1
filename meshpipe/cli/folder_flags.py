"""What commands that use a model in a folder share: where it is, its devices and processes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from meshpipe.cli.joined import ModelFlags, take_devices_of_run
from meshpipe.mesh import MeshConfig
from meshpipe.processes.config import DistributedConfig
from meshpipe.report.tables import make_console


@dataclass(frozen=True, kw_only=True)
class FolderFlags:
    """Flags of a command that uses a model."""

    folder: tyro.conf.Positional[Path]
    """The --run-dir or --checkpoint-dir of a run, or a folder of published weights, or of adapters of PEFT."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    computed: Annotated[ModelFlags, tyro.conf.OmitArgPrefixes] = field(default_factory=ModelFlags)
    distributed: Annotated[DistributedConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=DistributedConfig)

    def take_devices(self) -> Console:
        """Takes the devices of the mesh; returns where process 0 says what it does."""
        from meshpipe.processes.coordination import process_index

        console = make_console(stderr=True, quiet=process_index() > 0)
        take_devices_of_run(self.mesh, console)
        return console
