"""Which layout to train with on given devices: searched by arithmetic and simulation."""
