"""Controllers against each other on real models, at equal CPU time from an empty ledger.

python benchmarks/search.py [--data DIR] [--only PROBLEM] [--controllers auto,evopress] [--seeds 0 1 2] [--seconds 90]; resumable
row by row (a row is a problem, a controller and a seed). One thread. CPU-seconds are those of the whole process from the first
``ask`` on: evaluations and the controller's own thinking. What a winner is worth is measured on images (or tokens) that no search
saw: the mean KL to the original's answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))
from common import folders, give_back, load, save
from problems import PROBLEMS, Setting, make, one

from autocompress.types import Plan

MAIN = ("auto", "evopress", "evopress-fast", "exact", "amc", "bayes", "random", "uniform")

TITLE = "Controllers at equal CPU time: mean KL to the original's answers"
COLUMNS = [
    ("problem", "problem"),
    ("controller", "controller"),
    ("seed", "seed"),
    ("loss", "KL, search split"),
    ("held_out", "KL, held out"),
    ("error", "standard error"),
    ("answers", "plans judged"),
    ("examples", "examples judged"),
    ("seconds", "CPU-seconds"),
    ("ended", "ended by itself"),
]

COMMAND = "python benchmarks/search.py"
VERDICTS = [
    ("problem", "problem"),
    ("controller", "controller"),
    ("seeds", "seeds"),
    ("loss", "KL, search split"),
    ("held_out", "KL, held out"),
    ("interval", "± 95 %, seeds and images"),
    ("share", "examples to evopress' end"),
    ("verdict", "held out, against the best"),
]


def held_out(setting: Setting, plan: Plan) -> npt.NDArray[np.float64]:
    """KL to the original's answers of each example that no search saw.  # (n,)"""
    kls = [soft.kl(outputs) for soft, outputs in zip(setting.answers, setting.outputs(plan), strict=True)]
    parts = [kl.reshape(len(kl), -1).mean(1) for kl in kls]
    values: npt.NDArray[np.float64] = torch.cat(parts).numpy()
    return values


def interval(rows: list[dict[str, Any]]) -> float:
    """Half of the 95 % interval of the mean over seeds and images; of the images alone where there is one seed."""
    images = float(np.mean([row["error"] for row in rows]))  # the same images for all seeds: they do not average out
    values = [row["held_out"] for row in rows]
    n = len(values)
    seeds = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else 0.0
    return float(np.hypot(1.96 * images, seeds))


def spent_until(row: dict[str, Any], loss: float) -> float:
    """Examples judged until the search had a plan of this loss; infinite when it never had one."""
    return next((examples for _, examples, _, reached in row["path"] if reached <= loss), float("inf"))


def verdicts(rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One row a problem and controller: means over seeds, and whether it is worse than the best beyond the noise."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows.values():
        if row["loss"] is not None:
            runs.setdefault((row["problem"], row["controller"]), []).append(row)
    mean = {key: float(np.mean([row["held_out"] for row in found])) for key, found in runs.items()}
    table = {}
    for (problem, controller), found in sorted(runs.items(), key=lambda item: (item[0][0], mean[item[0]])):
        best = min((key for key in runs if key[0] == problem), key=mean.__getitem__)
        ahead = mean[problem, controller] - mean[best]
        noise = float(np.hypot(interval(found), interval(runs[best])))
        gap = mean.get((problem, "uniform"), float("nan")) - mean[best]
        if (problem, controller) == best:
            verdict = "best"
        elif ahead > noise:
            verdict = f"behind by {ahead:.2g}"
        else:
            verdict = "inconclusive" if noise > 0.1 * gap else "level"
        rivals = {row["seed"]: row for row in runs.get((problem, "evopress"), [])}
        shares = [
            spent_until(row, rivals[row["seed"]]["loss"]) / rivals[row["seed"]]["examples"]
            for row in found
            if row["seed"] in rivals
        ]
        table[f"{problem} {controller}"] = {
            "problem": problem,
            "controller": controller,
            "seeds": len(found),
            "loss": f"{np.mean([row['loss'] for row in found]):.4f}",
            "held_out": f"{mean[problem, controller]:.4f}",
            "interval": f"{interval(found):.4f}",
            "share": ", ".join(f"{share:.0%}" if share < float("inf") else "never" for share in shares) or "–",
            "verdict": verdict,
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    parser.add_argument("--only", nargs="*", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--controllers", default=",".join(MAIN))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--name", default="search", help="name of the files with the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.only:
        setting: Setting | None = None
        for seed in args.seeds:
            for controller in args.controllers.split(","):
                key = f"{name} {controller} {seed}"
                if key in load(args.name):
                    continue
                setting = setting or make(PROBLEMS[name], args.data)
                row, plan = one(setting, controller, seed, args.seconds)
                give_back()
                row = {"problem": name, **row}
                if plan is not None:
                    values = held_out(setting, plan)
                    row |= {"held_out": float(values.mean()), "error": float(values.std(ddof=1) / len(values) ** 0.5)}
                print(key, {k: v for k, v in row.items() if k not in ("path",)}, flush=True)
                save(args.name, {**load(args.name), key: row}, COLUMNS, TITLE, COMMAND)
    save(f"{args.name}_verdicts", verdicts(load(args.name)), VERDICTS, f"{TITLE}, over seeds", COMMAND)


if __name__ == "__main__":
    main()
