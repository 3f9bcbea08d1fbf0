"""What the stages and the commands share, independent of data sets."""

__version__ = "1.0.0"
