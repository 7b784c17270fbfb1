"""What happened in a step: times, hangs, numbers that are not finite."""
