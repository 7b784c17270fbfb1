"""Prepares text for training: tokenizes, packs and writes it to files that training reads at random."""

from meshpipe.data.preparation.config import PrepareConfig as PrepareConfig
from meshpipe.data.preparation.folder import Prepared as Prepared
from meshpipe.data.preparation.folder import prepare as prepare
