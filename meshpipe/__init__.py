"""Hybrid parallelism for JAX and Flax NNX on one named device mesh."""

from typing import TYPE_CHECKING

from meshpipe import host as host
from meshpipe.checkpoint import Checkpointer as Checkpointer
from meshpipe.checkpoint import CheckpointError as CheckpointError
from meshpipe.config import Config as Config
from meshpipe.data import DataConfig as DataConfig
from meshpipe.layers.fields import call as call
from meshpipe.layers.fields import with_fields as with_fields
from meshpipe.layers.layer import LayerLike as LayerLike
from meshpipe.loading import load as load
from meshpipe.mesh import MeshConfig as MeshConfig
from meshpipe.mesh import make_mesh as make_mesh
from meshpipe.mesh import submeshes as submeshes
from meshpipe.mesh import use_cpu_devices as use_cpu_devices
from meshpipe.models.model import ModelConfig as ModelConfig
from meshpipe.models.reference import Reference as Reference
from meshpipe.optimizer.config import OptimizerConfig as OptimizerConfig
from meshpipe.pipeline.config import PipelineConfig as PipelineConfig
from meshpipe.plan.plan import Action as Action
from meshpipe.plan.plan import Op as Op
from meshpipe.plan.plan import Plan as Plan
from meshpipe.plan.schedules import make_plan as make_plan
from meshpipe.reference.comparison import VerifyReport as VerifyReport
from meshpipe.reference.verify import verify as verify
from meshpipe.run.history import RunResult as RunResult
from meshpipe.sharding import ShardingRules as ShardingRules
from meshpipe.trainer import Trainer as Trainer
from meshpipe.training.result import NonFiniteError as NonFiniteError
from meshpipe.training.result import StepResult as StepResult
from meshpipe.version import __version__ as __version__

if TYPE_CHECKING:
    from meshpipe.run.function import run as run
else:
    from meshpipe import run as run
