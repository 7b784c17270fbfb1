"""Functions that return no config."""


def number():
    return 3


def fails():
    raise ValueError("no such layout")
