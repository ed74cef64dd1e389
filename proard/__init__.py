"""Train one robust supernet once; ask for a student at any cost budget and get a checked artefact."""

__version__ = "0.1.0"
