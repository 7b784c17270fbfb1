"""Example models, whose layers are written to be read."""

from meshpipe.layers.embed import Embed as Embed
from meshpipe.models.encoder_decoder import EncoderDecoderConfig as EncoderDecoderConfig
from meshpipe.models.gpt2 import GPT2Config as GPT2Config
from meshpipe.models.language_model import LanguageModelConfig as LanguageModelConfig
from meshpipe.models.model import LayerConstructor as LayerConstructor
from meshpipe.models.model import ModelConfig as ModelConfig
from meshpipe.models.model import SumAndWeight as SumAndWeight
from meshpipe.models.resnet import ResNetConfig as ResNetConfig
from meshpipe.models.text_classifier import TextClassifierConfig as TextClassifierConfig
