"""DAPO's parts one by one, measured: runs what is missing, then writes the table, the page and the pictures.

    python -m tests.benchmarks.ablation [--arms NAME ...] [--seeds 0 1 2] [--jobs 2] [--minutes 60]

Every run is `rlhf train dapo/ablation` in a process of its own. A finished run is one small JSON in
`docs/measured/ablation`, which counts as long as the recipe resolves to what it was made with; another call
makes only what is not there. A call that is stopped lets its runs finish their step and save, and the next
call goes on from there. `--page` runs nothing and writes the page from what is there; `key=value` changes
the recipe for every arm.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.errors import UserError
from tests.benchmarks.ablation import page
from tests.benchmarks.ablation.arms import ARMS, BY_NAME, RECIPE, Arm, relevant, resolve, still_valid
from tests.benchmarks.ablation.results import Result, path_of, read
from tests.benchmarks.ablation.runs import Job, run_all

ROOT = Path(__file__).resolve().parents[3]
SEEDS = (0, 1, 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, then report; 1 when a run failed, 2 when the arms cannot be run."""
    parser = _parser()
    options = parser.parse_args(argv)
    overrides = tuple(options.overrides)
    try:
        budget = resolve(options.recipe, BY_NAME["dapo"], 0, overrides).loop.max_tokens
    except UserError as error:
        parser.error(str(error))
    if not budget:
        parser.error("loop.max_tokens=0 is no budget to compare arms at: set it to a number of tokens.")
    arms = [BY_NAME[name] for name in options.arms]
    jobs = [
        Job(arm, seed, options.recipe, overrides)
        for seed in options.seeds
        for arm in arms
        if valid(options.results, options.recipe, arm, seed, overrides) is None
    ]
    failed = 0
    if not options.page:
        print(f"{len(jobs)} of {len(arms) * len(options.seeds)} runs are to be made.", flush=True)
        failed = run_all(
            jobs, options.out, options.results, side_by_side=options.jobs, minutes=options.minutes
        )
    report(options.results, options.recipe, options.docs, overrides)
    return int(failed > 0)


def report(folder: Path, recipe: str, page_path: Path, overrides: tuple[str, ...] = ()) -> None:
    """Print the table and write it and the pictures where the page is."""
    results = collect(folder, recipe, overrides)
    print(page.section(results))
    page.write_page(page_path, results)
    page.draw(results, page_path.parent)


def collect(folder: Path, recipe: str = RECIPE, overrides: tuple[str, ...] = ()) -> dict[str, list[Result]]:
    """Arm -> its valid results in `folder`, by seed."""
    seeds = sorted({int(path.stem.rpartition("seed")[2]) for path in folder.glob("*-seed*.json")})
    found = {arm.name: [valid(folder, recipe, arm, seed, overrides) for seed in seeds] for arm in ARMS}
    return {name: [run for run in runs if run is not None] for name, runs in found.items()}


def valid(folder: Path, recipe: str, arm: Arm, seed: int, overrides: tuple[str, ...] = ()) -> Result | None:
    """The result of one run, if it is there and was made with what the recipe says now."""
    result = read(path_of(folder, arm.name, seed))
    now = relevant(resolve(recipe, arm, seed, overrides))
    return result if result is not None and still_valid(result.config, now) else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [arm.name for arm in ARMS]
    parser.add_argument(
        "--arms", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; they share the cores")
    parser.add_argument("--minutes", type=float, help="start no run after so many minutes")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folders of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/measured/ablation")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/dapo.md", help="page to write into")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page")
    parser.add_argument("overrides", nargs="*", default=[], help="changes to the recipe, for every arm")
    return parser


if __name__ == "__main__":
    sys.exit(main())
