"""The networks of reinforcement learning: AMC's actor and critic with replay, N2N's recurrent policies.

The only module of the search that knows torch; controllers import it when they run. Knows nothing of plans, costs or budgets.
Networks are small, so each runs on one thread, and weights come from a generator of their own: the same numbers in every process.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.errors import UsageError
from autocompress.search.tables import FloatArray

HIDDEN = 300
ACTOR_RATE, CRITIC_RATE = 1e-4, 1e-3
BATCH = 64
TAU = 0.01
DISCOUNT = 1.0
BASELINE = 0.5
"""AMC's constants: layer widths, learning rates, replay batch, target network and reward averages."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever number of threads models are evaluated with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def truncated_normal(mean: float, sigma: float, uniform: float) -> float:
    """The ``uniform`` quantile of a normal distribution cut to [0, 1]: inverse transform of a number in [0, 1)."""
    normal = NormalDist(mean, sigma)
    low, high = normal.cdf(0.0), normal.cdf(1.0)
    p = min(max(low + uniform * (high - low), 1e-12), 1 - 1e-12)
    return min(max(normal.inv_cdf(p), 0.0), 1.0)


def _draw_weights(module: nn.Module, generator: torch.Generator, fan_in: int | None = None) -> None:
    """torch's own uniform initialisation, ``1/sqrt(fan in)``, from a generator instead of the global seed."""
    for child in module.modules():
        for weight in child.parameters(recurse=False):
            inputs = child.in_features if isinstance(child, nn.Linear) else fan_in
            bound = 1 / math.sqrt(inputs or weight.shape[-1])
            with torch.no_grad():
                weight.copy_(torch.empty_like(weight).uniform_(-bound, bound, generator=generator))


def _mlp(inputs: int, generator: torch.Generator) -> nn.Sequential:
    layers = [nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)]
    network = nn.Sequential(*layers)
    _draw_weights(network, generator)
    return network


def _step(optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], loss: Tensor) -> None:
    """One step down the gradient of ``loss``, of these weights alone."""
    for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        weight.grad = gradient
    optimizer.step()


class Ddpg:
    """Deep deterministic policy gradient (Lillicrap et al. 2016) with AMC's constants; states and actions in [0, 1].

    ``memory``: transitions that the replay holds. One reward an episode, given to each of its steps; an exponential average of
    what was replayed is subtracted.
    """

    def __init__(self, n_states: int, memory: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]), one_thread():
            self.actor, self.critic = _mlp(n_states, generator), _mlp(n_states + 1, generator)
            self.actor_target, self.critic_target = _mlp(n_states, generator), _mlp(n_states + 1, generator)
        self.actor_target.load_state_dict(self.actor.state_dict())
        self.critic_target.load_state_dict(self.critic.state_dict())
        self._averages = [
            (target, source)
            for pair in ((self.actor_target, self.actor), (self.critic_target, self.critic))
            for target, source in zip(pair[0].parameters(), pair[1].parameters(), strict=True)
        ]
        self.actor_steps = torch.optim.Adam(self.actor.parameters(), ACTOR_RATE, fused=True)
        self.critic_steps = torch.optim.Adam(self.critic.parameters(), CRITIC_RATE, fused=True)
        self.memory, self.baseline = memory, math.nan
        self._replay: list[npt.NDArray[np.float32]] = []  # rows: state, next state, action, reward, whether it goes on
        self._oldest = 0
        self._n = n_states

    def act(self, state: FloatArray) -> float:
        """The actor's action, without noise."""
        with torch.inference_mode(), one_thread():
            row = torch.from_numpy(state.astype(np.float32))
            return float(torch.sigmoid(self.actor(row)))

    def observe(self, states: FloatArray, actions: FloatArray, reward: float) -> None:
        """Keep an episode: ``states``  # (n_steps, n_states), ``actions``  # (n_steps,)"""
        after = np.concatenate([states[1:], np.zeros((1, self._n))])
        for step in range(len(states)):
            last = [actions[step], reward, float(step + 1 < len(states))]
            row = np.concatenate([states[step], after[step], last]).astype(np.float32)
            if len(self._replay) < self.memory:
                self._replay.append(row)
            else:
                self._replay[self._oldest] = row
                self._oldest = (self._oldest + 1) % self.memory

    def update(self, rng: random.Random, n: int = 1) -> None:
        """``n`` steps of critic and actor, each on a batch drawn from the replay with ``rng``."""
        with one_thread():
            for _ in range(n):
                rows = [self._replay[rng.randrange(len(self._replay))] for _ in range(BATCH)]
                self._learn(torch.from_numpy(np.stack(rows)))

    def _learn(self, batch: Tensor) -> None:
        state, after = batch[:, : self._n], batch[:, self._n : 2 * self._n]
        action, reward, goes_on = (batch[:, 2 * self._n + i, None] for i in range(3))
        mean = float(reward.mean())
        self.baseline = mean if math.isnan(self.baseline) else self.baseline + BASELINE * (mean - self.baseline)
        with torch.no_grad():
            following = self.critic_target(torch.cat([after, torch.sigmoid(self.actor_target(after))], 1))
            value = reward - self.baseline + DISCOUNT * goes_on * following
        error = functional.mse_loss(self.critic(torch.cat([state, action], 1)), value)
        _step(self.critic_steps, list(self.critic.parameters()), error)
        regret = -self.critic(torch.cat([state, torch.sigmoid(self.actor(state))], 1)).mean()
        _step(self.actor_steps, list(self.actor.parameters()), regret)
        with torch.no_grad():
            targets, sources = zip(*self._averages, strict=True)
            torch._foreach_lerp_(targets, sources, TAU)


class Recurrent:
    """A recurrent policy over a sequence of sites (N2N learning, Ashok et al. 2018), trained by REINFORCE.

    ``autoregressive``: a two-layer LSTM that also reads the last action (N2N's shrinkage); otherwise a bidirectional one that
    sees the whole network at once (N2N's removal). Two layers of 30 and Adam 0.003 are N2N's. The baseline is a
    moving average of rewards.
    """

    hidden, layers, rate, average, clip = 30, 2, 3e-3, 0.3, 0.2

    def __init__(self, n_features: int, n_actions: int, autoregressive: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.n_actions, self.autoregressive = n_actions, autoregressive
        inputs, width = n_features + autoregressive, self.hidden * (1 if autoregressive else 2)
        with torch.random.fork_rng(devices=[]), one_thread():
            self.lstm = nn.LSTM(inputs, self.hidden, self.layers, batch_first=True, bidirectional=not autoregressive)
            self.head = nn.Linear(width, n_actions)
            self.network = nn.ModuleDict({"lstm": self.lstm, "head": self.head})
            _draw_weights(self.network, generator, self.hidden)
        with torch.no_grad():
            self.head.weight.mul_(0.1)  # begins near the prior
            self.head.bias.zero_()
        self.steps = torch.optim.Adam(self.network.parameters(), self.rate)
        self.baseline = math.nan

    def sample(
        self, sites: FloatArray, prior: FloatArray, n: int, rng: random.Random, temperature: float = 1.0
    ) -> list[list[int]]:
        """``n`` sequences of actions. ``sites``  # (n_sites, n_features), ``prior`` logits  # (n_sites, n_actions)"""
        draws = np.array([[rng.random() for _ in range(len(sites))] for _ in range(n)])
        with torch.inference_mode(), one_thread():
            rows, biases = _tensor(sites), _tensor(prior)
            if not self.autoregressive:
                logits = (self.head(self.lstm(rows[None])[0])[0] + biases) / temperature
                found = [_inverse(logits[i].expand(n, -1), draws[:, i]) for i in range(len(sites))]
                return [[int(a[k]) for a in found] for k in range(n)]
            memory: tuple[Tensor, Tensor] | None = None
            last = torch.zeros(n)
            actions: list[Tensor] = []
            for i in range(len(sites)):
                seen = torch.cat([rows[i].expand(n, -1), last[:, None]], 1)[:, None]
                out, memory = self.lstm(seen, memory)
                actions.append(_inverse((self.head(out[:, 0]) + biases[i]) / temperature, draws[:, i]))
                last = actions[-1] / max(self.n_actions - 1, 1)
            return [[int(a[k]) for a in actions] for k in range(n)]

    def reinforce(
        self,
        sites: FloatArray,
        prior: FloatArray,
        sequences: Sequence[Sequence[int]],
        rewards: Sequence[float],
        updates: int = 1,
    ) -> None:
        """Steps along the gradient of the log-probability, times each reward above the baseline (Williams 1992).

        Rewards above the baseline count in units of their spread. Steps after the first stop where an action's probability has
        changed by ``clip`` (Schulman et al. 2017), or the worst plans alone would drive them.
        """
        mean = float(np.mean(rewards))
        baseline = mean if math.isnan(self.baseline) else self.baseline
        self.baseline = self.average * baseline + (1 - self.average) * mean
        spread = float(np.std(rewards))
        with one_thread():
            actions = torch.tensor(sequences)  # (n, n_sites)
            gain = (torch.tensor(rewards, dtype=torch.float32)[:, None] - baseline) / (spread + 1e-6)
            before: Tensor | None = None
            for _ in range(updates):
                logits = self._logits(_tensor(sites), actions) + _tensor(prior)
                chosen = functional.log_softmax(logits, -1).gather(-1, actions[..., None])[..., 0]
                before = chosen.detach() if before is None else before
                ratio = (chosen - before).exp()
                clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
                regret = -torch.minimum(ratio * gain, clipped * gain).sum(1).mean()
                _step(self.steps, list(self.network.parameters()), regret)

    def _logits(self, rows: Tensor, actions: Tensor) -> Tensor:
        """# (n, n_sites, n_actions)"""
        inputs = rows.expand(len(actions), -1, -1)
        if self.autoregressive:
            last = functional.pad(actions[:, :-1] / max(self.n_actions - 1, 1), (1, 0))
            inputs = torch.cat([inputs, last[..., None]], -1)
        logits: Tensor = self.head(self.lstm(inputs)[0])
        return logits

    def state(self) -> dict[str, Any]:
        """Weights as JSON values."""
        return {name: weight.tolist() for name, weight in self.network.state_dict().items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state` of a policy for another space; a state of another shape is refused."""
        mine = self.network.state_dict()
        try:
            weights = {name: torch.tensor(state[name], dtype=torch.float32) for name in mine}
        except (KeyError, TypeError, ValueError):
            raise UsageError("A policy is what policy_state() gave, with its weights as lists of numbers.") from None
        for name, weight in weights.items():
            if weight.shape != mine[name].shape:
                raise UsageError(
                    f"This policy's {name!r} has shape {tuple(weight.shape)}, this version's {tuple(mine[name].shape)}; "
                    "train it anew."
                )
        self.network.load_state_dict(weights)


def _tensor(values: FloatArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def _inverse(logits: Tensor, draws: FloatArray) -> Tensor:
    """Categorical draws by inverse transform. ``logits``  # (n, n_actions), ``draws``  # (n,)"""
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    places = (cumulative < torch.from_numpy(draws)[:, None]).sum(-1)
    return places.clamp(max=logits.shape[-1] - 1)
