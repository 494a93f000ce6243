"""fnqueue: the durable invocation queue for GPU functions."""

__version__ = "0.1.0"
