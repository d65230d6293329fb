"""The greedy order of sensitivities."""

from __future__ import annotations

from controller_contract import ControllerContract


class TestGreedy(ControllerContract):
    name = "greedy"
    finds_optimum = False
