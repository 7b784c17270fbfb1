"""Weights as others publish them: folders of safetensors with a config.json, in and out."""

from meshpipe.weights.errors import WeightsError as WeightsError
from meshpipe.weights.folder import WeightsFolder as WeightsFolder
from meshpipe.weights.folder import is_weights_folder as is_weights_folder
from meshpipe.weights.model_of import model_of as model_of
