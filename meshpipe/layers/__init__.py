"""What the user gives, layers, loss and batch, cut into stages."""
