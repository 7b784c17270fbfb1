"""Weights as others publish them: folders of safetensors with a config.json, in and out."""

from meshpipe.weights.errors import WeightsError as WeightsError
from meshpipe.weights.folder import WeightsFolder as WeightsFolder
from meshpipe.weights.folder import is_published as is_published
from meshpipe.weights.model_of import model_of as model_of
