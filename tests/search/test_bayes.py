"""Optuna's samplers as controllers, and the study that stays behind."""

from __future__ import annotations

from controller_contract import ControllerContract


class TestBayes(ControllerContract):
    name = "bayes"


class TestBayesNSGA2(ControllerContract):
    name = "bayes-nsga2"


class TestBayesNSGA3(ControllerContract):
    name = "bayes-nsga3"


class TestBayesCMAES(ControllerContract):
    name = "bayes-cmaes"
