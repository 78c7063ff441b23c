"""Verdicts of graders that are not ours, for `grader_agreement.py`; imports nothing of Whetstone.

It runs under a Python of its own, because these packages want another ANTLR runtime than Hydra:

    python3 -m venv /tmp/grader-venv
    /tmp/grader-venv/bin/pip install --no-deps lm-eval==0.4.13 mathruler==0.1.0 math-verify==0.9.0 \
        latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.11.0 sympy==1.14.0 mpmath==1.3.0 \
        pylatexenc==2.11 tqdm==4.67.1

Standard input: JSON lines `{"gold": …, "response": …}`. Standard output: a JSON line each, grader -> verdict.
`prm800k`, `hendrycks` and `minerva` use neither math-verify's parser nor its comparison (lm-eval's module
imports it for a metric that is not asked for here). `library` is math-verify called plainly, to show what our
use of it changes.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

LIMIT_S = 10


def harness(task: str) -> ModuleType:
    """`utils.py` of a task of lm-eval, without importing the package (which wants torch and datasets)."""
    package = importlib.util.find_spec("lm_eval")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("lm_eval is not installed here: see the top of other_graders.py")
    path = Path(package.submodule_search_locations[0]) / "tasks" / task / "utils.py"
    spec = importlib.util.spec_from_file_location(f"harness_{task}", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def graders() -> dict[str, Callable[[str, str], bool]]:
    """Name -> verdict on a gold and a response, each with the box extraction of its own package."""
    import math_verify
    from mathruler import grader as prm800k

    hendrycks, minerva = harness("aime"), harness("minerva_math")

    def content(module: Any, response: str) -> str:
        box = module.last_boxed_only_string(response)
        return "" if box is None else str(module.remove_boxed(box))

    def by_minerva(gold: str, response: str) -> bool:
        answer = minerva.normalize_final_answer(content(minerva, response))
        return bool(minerva.is_equiv(answer, minerva.normalize_final_answer(gold)))

    return {
        "prm800k": lambda gold, response: prm800k.grade_answer(prm800k.extract_boxed_content(response), gold),
        "hendrycks": lambda gold, response: hendrycks.is_equiv(content(hendrycks, response), gold),
        "minerva": by_minerva,
        "library": lambda gold, response: math_verify.verify(
            math_verify.parse(f"${gold}$", parsing_timeout=None),
            math_verify.parse(response, parsing_timeout=None),
            timeout_seconds=None,
        ),
    }


def _out_of_time(*_: object) -> None:
    raise TimeoutError


def main() -> None:
    """Grade standard input until it ends; what raises or takes too long is no."""
    logging.disable()
    signal.signal(signal.SIGALRM, _out_of_time)
    known = graders()
    for line in sys.stdin:
        case = json.loads(line)
        verdicts = {}
        for name, grade in known.items():
            signal.alarm(LIMIT_S)
            try:
                verdicts[name] = bool(grade(case["gold"], case["response"]))
            except Exception:
                verdicts[name] = False
            finally:
                signal.alarm(0)
        print(json.dumps(verdicts), flush=True)


if __name__ == "__main__":
    main()
