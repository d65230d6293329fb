"""Controllers that learn a policy: the contract, the action wall, and what each promises beyond."""

from __future__ import annotations

from controller_contract import ControllerContract


class TestAmc(ControllerContract):
    name = "amc"


class TestConditional(ControllerContract):
    name = "conditional"


class TestReinforce(ControllerContract):
    name = "reinforce"
