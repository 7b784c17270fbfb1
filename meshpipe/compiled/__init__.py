"""What XLA made of a model's programs: their memory, operations and collectives, for devices that need not be here."""
