"""Hybrid parallelism for JAX and Flax NNX on one named device mesh."""

# Every name is imported at its first use, so that `import meshpipe` takes no time, and a command can be stopped while
# it imports JAX.
from typing import TYPE_CHECKING

from meshpipe.lazy import importing
from meshpipe.version import __version__ as __version__

if TYPE_CHECKING:
    from meshpipe import host as host
    from meshpipe.adapters.config import LoraConfig as LoraConfig
    from meshpipe.adapters.groups import LoraGroup as LoraGroup
    from meshpipe.adapters.lora import lora as lora
    from meshpipe.adapters.merge import merge_lora as merge_lora
    from meshpipe.checkpoint import Checkpointer as Checkpointer
    from meshpipe.checkpoint import CheckpointError as CheckpointError
    from meshpipe.config import Config as Config
    from meshpipe.data import DataConfig as DataConfig
    from meshpipe.generation.config import SamplingConfig as SamplingConfig
    from meshpipe.generation.generator import Generator as Generator
    from meshpipe.layers.assembled import assemble as assemble
    from meshpipe.layers.fields import call as call
    from meshpipe.layers.fields import named as named
    from meshpipe.layers.fields import reading as reading
    from meshpipe.layers.fields import sows as sows
    from meshpipe.layers.fields import with_fields as with_fields
    from meshpipe.layers.layer import LayerLike as LayerLike
    from meshpipe.loading import load as load
    from meshpipe.loss_term import LossTerm as LossTerm
    from meshpipe.mesh import MeshConfig as MeshConfig
    from meshpipe.mesh import make_mesh as make_mesh
    from meshpipe.mesh import submeshes as submeshes
    from meshpipe.mesh import use_cpu_devices as use_cpu_devices
    from meshpipe.models.model import ModelConfig as ModelConfig
    from meshpipe.models.reference import Reference as Reference
    from meshpipe.optimizer.config import OptimizerConfig as OptimizerConfig
    from meshpipe.optimizer.groups import ParameterGroup as ParameterGroup
    from meshpipe.phases import Phase as Phase
    from meshpipe.phases import listening as listening
    from meshpipe.pipeline.config import PipelineConfig as PipelineConfig
    from meshpipe.plan.plan import Action as Action
    from meshpipe.plan.plan import Op as Op
    from meshpipe.plan.plan import Plan as Plan
    from meshpipe.plan.schedules import make_plan as make_plan
    from meshpipe.reference.comparison import VerifyReport as VerifyReport
    from meshpipe.reference.verify import verify as verify
    from meshpipe.runs.function import run as run
    from meshpipe.runs.history import RunResult as RunResult
    from meshpipe.sharding import ShardingRules as ShardingRules
    from meshpipe.trainer import Trainer as Trainer
    from meshpipe.training.result import NonFiniteError as NonFiniteError
    from meshpipe.training.result import StepResult as StepResult

_MODULES = {
    "host": "meshpipe.host",
    "LoraConfig": "meshpipe.adapters.config",
    "LoraGroup": "meshpipe.adapters.groups",
    "lora": "meshpipe.adapters.lora",
    "merge_lora": "meshpipe.adapters.merge",
    "Checkpointer": "meshpipe.checkpoint",
    "CheckpointError": "meshpipe.checkpoint",
    "Config": "meshpipe.config",
    "DataConfig": "meshpipe.data",
    "Generator": "meshpipe.generation.generator",
    "SamplingConfig": "meshpipe.generation.config",
    "assemble": "meshpipe.layers.assembled",
    "call": "meshpipe.layers.fields",
    "named": "meshpipe.layers.fields",
    "reading": "meshpipe.layers.fields",
    "sows": "meshpipe.layers.fields",
    "with_fields": "meshpipe.layers.fields",
    "LayerLike": "meshpipe.layers.layer",
    "LossTerm": "meshpipe.loss_term",
    "load": "meshpipe.loading",
    "MeshConfig": "meshpipe.mesh",
    "make_mesh": "meshpipe.mesh",
    "submeshes": "meshpipe.mesh",
    "use_cpu_devices": "meshpipe.mesh",
    "ModelConfig": "meshpipe.models.model",
    "Reference": "meshpipe.models.reference",
    "OptimizerConfig": "meshpipe.optimizer.config",
    "ParameterGroup": "meshpipe.optimizer.groups",
    "Phase": "meshpipe.phases",
    "listening": "meshpipe.phases",
    "PipelineConfig": "meshpipe.pipeline.config",
    "Action": "meshpipe.plan.plan",
    "Op": "meshpipe.plan.plan",
    "Plan": "meshpipe.plan.plan",
    "make_plan": "meshpipe.plan.schedules",
    "VerifyReport": "meshpipe.reference.comparison",
    "verify": "meshpipe.reference.verify",
    "run": "meshpipe.runs.function",
    "RunResult": "meshpipe.runs.history",
    "ShardingRules": "meshpipe.sharding",
    "Trainer": "meshpipe.trainer",
    "NonFiniteError": "meshpipe.training.result",
    "StepResult": "meshpipe.training.result",
}
"""By name, the module that has it; a submodule has its own name."""

__all__ = sorted(_MODULES)
__getattr__, __dir__ = importing(globals(), _MODULES)
