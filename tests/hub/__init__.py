"""A Hub on loopback, and the tests of what peft_attrsub does with one."""

from .server import Hub

__all__ = ["Hub"]
