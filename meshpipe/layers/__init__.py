"""The user's layers, loss and batch, cut into stages."""
