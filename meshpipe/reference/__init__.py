"""The same training without the engine, on one device, and the comparison with it."""
