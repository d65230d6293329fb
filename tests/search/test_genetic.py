"""Compressor's genetic algorithm."""

from __future__ import annotations

from controller_contract import ControllerContract


class TestGenetic(ControllerContract):
    name = "genetic"
    finds_optimum = False
