"""The version of the distribution, and of the compiled part that belongs to it."""

version = "0.2.0"
