"""Machines that are described by their rates, memory and links, whether or not they are here."""
