"""Controllers against each other on real models, at equal CPU time from an empty ledger.

python benchmarks/search.py [--data DIR] [--only PROBLEM] [--controllers auto,evopress] [--seeds 0 1 2] [--seconds 90]; resumable
row by row (a row is a problem, a controller and a seed). One thread. CPU-seconds are those of the whole process from the first
``ask`` on: evaluations and the controller's own thinking. What a winner is worth is measured on images (or tokens) that no search
saw: the mean KL to the original's answers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import folders, load, save
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


def held_out(setting: Setting, plan: Plan) -> npt.NDArray[np.float64]:
    """KL to the original's answers of each example that no search saw.  # (n,)"""
    kls = [soft.kl(outputs) for soft, outputs in zip(setting.answers, setting.outputs(plan), strict=True)]
    parts = [kl.reshape(len(kl), -1).mean(1) for kl in kls]
    values: npt.NDArray[np.float64] = torch.cat(parts).numpy()
    return values


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
                row = {"problem": name, **row}
                if plan is not None:
                    values = held_out(setting, plan)
                    row |= {"held_out": float(values.mean()), "error": float(values.std(ddof=1) / len(values) ** 0.5)}
                print(key, {k: v for k, v in row.items() if k not in ("path",)}, flush=True)
                save(args.name, {**load(args.name), key: row}, COLUMNS, TITLE, "python benchmarks/search.py")


if __name__ == "__main__":
    main()
