"""Honest timing: contestants in processes of their own, taken in turn, and what they cost."""

from .contest import Contestant, Result, measure
from .workers import Spread, Turn, Worker, machine_facts, serve, take_turns

__all__ = [
    "Contestant",
    "Result",
    "Spread",
    "Turn",
    "Worker",
    "machine_facts",
    "measure",
    "serve",
    "take_turns",
]
