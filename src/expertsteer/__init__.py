"""Steer a language model with vectors taken from another one."""

__version__ = "0.1.0"
