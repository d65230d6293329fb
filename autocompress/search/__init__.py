"""Search over compression plans: controllers behind ask and tell, the Pareto front, feasibility of budgets.

Knows spaces, cost tables and evaluations; never a model, never a device.
"""

from __future__ import annotations

from autocompress.search.alds import Alds
from autocompress.search.amc import Amc
from autocompress.search.auto import Auto
from autocompress.search.base import CONTROLLERS, BaseController
from autocompress.search.bayes import Bayes
from autocompress.search.conditional import Conditional
from autocompress.search.evolution import Evolution
from autocompress.search.evopress import EvoPress
from autocompress.search.exact import Exact
from autocompress.search.feasible import check_feasible, lower_bounds
from autocompress.search.front import ParetoFront
from autocompress.search.genetic import Genetic
from autocompress.search.gradient import Gradient
from autocompress.search.greedy import Greedy
from autocompress.search.polish import Polish
from autocompress.search.race import Racer, racers, run_race
from autocompress.search.random_ import Random
from autocompress.search.reinforce import Reinforce
from autocompress.search.run import SearchOutcome, run
from autocompress.search.spdy import Spdy
from autocompress.search.table_front import FrontPoint, table_front
from autocompress.search.uniform import Uniform

__all__ = [
    "CONTROLLERS",
    "Alds",
    "Amc",
    "Auto",
    "BaseController",
    "Bayes",
    "Conditional",
    "EvoPress",
    "Evolution",
    "Exact",
    "FrontPoint",
    "Genetic",
    "Gradient",
    "Greedy",
    "ParetoFront",
    "Polish",
    "Racer",
    "Random",
    "Reinforce",
    "SearchOutcome",
    "Spdy",
    "Uniform",
    "check_feasible",
    "lower_bounds",
    "racers",
    "run",
    "run_race",
    "table_front",
]
