"""The `rlhf` command: a sub-command, a recipe, then overrides. Imports nothing heavy before it must."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

RANK_0_SECONDS = 60.0
"""How long a rank above 0 keeps a sentence to itself; torchrun ends it when rank 0 has said the same."""

_TRAIN = """example:
  rlhf train dapo/arithmetic learner.optimizer.lr=2e-6 algorithm.clip.high=0.28
  rlhf train ./mine.yaml loop.steps=20 --dry-run
  rlhf train dapo/arithmetic resume=auto    # goes on with a run that was ended"""

_EVAL = """examples:
  rlhf eval aime24 model.path=Qwen/Qwen2.5-7B-Instruct
  rlhf eval gsm8k data.path=../shared/data/gsm8k_test.jsonl model.path=runs/demo@last protocol=greedy
  rlhf eval math500 endpoint.url=http://localhost:8000/v1
  rlhf eval compare evaluations/A evaluations/B
  rlhf eval dapo/arithmetic model.path=runs/dapo-arithmetic@last   # the recipe's held-out set"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit status.

    0; 2 after a sentence about what the user can mend; 1 when a run had to stop; 130 after Ctrl-C and 143
    after SIGTERM.
    """
    arguments = _parser().parse_args(_flags_first(sys.argv[1:] if argv is None else argv))
    from rlhf.errors import InterruptedRunError, RunStoppedError, UserError
    from trainer.parallel.world import World

    world = World.from_environment()
    try:
        command: Callable[[argparse.Namespace], int] = arguments.command
        if world.follows and command is not _train:
            return 0  # rank 0 does it
        return command(arguments)
    except UserError as error:
        _let_rank_0_speak(world.follows)
        print(f"rlhf: {error}", file=sys.stderr)
        return 2
    except RunStoppedError as error:
        print(f"rlhf: {error}", file=sys.stderr)
        return 1
    except InterruptedRunError as error:
        print(f"rlhf: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("rlhf: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 0


def _let_rank_0_speak(follows: bool) -> None:
    """Rank 0 most likely says the same, whereupon torchrun ends this process: one sentence, not one each."""
    if follows:
        import time

        time.sleep(RANK_0_SECONDS)


def _reader_is_gone() -> bool:
    """Whether what reads our output has ended (`| head`). Other pipes break too, and then that is a fault."""
    import select

    poll = select.poll()
    poll.register(1, 0)  # an error is told without being asked for
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _flags_first(argv: Sequence[str]) -> list[str]:
    """`--dry-run` may stand anywhere; argparse alone refuses one between the recipe and its overrides."""
    flags = [word for word in argv if word == "--dry-run"]
    rest = [word for word in argv if word != "--dry-run"]
    return [*rest[:1], *flags, *rest[1:]]


def _parser() -> argparse.ArgumentParser:
    """The static command tree: `--help` composes no configuration and imports no torch."""
    parser = argparse.ArgumentParser(
        prog="rlhf",
        description="Reinforcement-learning post-training, from a laptop to a cluster.",
        epilog="First steps: 'rlhf doctor', 'rlhf recipes', 'rlhf train dapo/arithmetic'.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = _recipe_command(commands, "train", _train, "train a recipe", _TRAIN)
    train.add_argument("--dry-run", action="store_true", help="validate everything short of loading a model")
    _recipe_command(
        commands,
        "explain",
        _explain,
        "say what a recipe does: batch arithmetic, memory, each switch",
        "example:\n  rlhf explain dapo/arithmetic loop.group_size=16",
    )
    _recipe_command(
        commands,
        "eval",
        _eval,
        "score a model on a benchmark, or on a recipe's held-out set; compare two scores",
        _EVAL,
    )
    replay = commands.add_parser(
        "replay",
        help="learn one recorded step of a run again",
        description="Learn one recorded step of a run again and compare it with what the run recorded.",
        epilog="example:\n  rlhf replay runs/demo@40\n  rlhf replay runs/demo@40 algorithm.clip.high=0.3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    replay.add_argument("step", metavar="RUN@STEP", help="a run's folder or name, and a step of it")
    replay.add_argument("overrides", metavar="key=value", nargs="*", help="changes to learning")
    replay.set_defaults(command=_replay)
    recipes = commands.add_parser("recipes", help="list the recipes", description="List the recipes.")
    recipes.set_defaults(command=_recipes)
    doctor = commands.add_parser("doctor", help="check this machine", description="Check this machine.")
    doctor.set_defaults(command=_doctor)
    export = commands.add_parser(
        "export",
        help="write a run's model as a Hugging Face folder",
        epilog="example:\n  rlhf export runs/demo --to out/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("run", metavar="RUN", help="run folder, or RUN@STEP")
    export.add_argument(
        "--to", required=True, metavar="FOLDER", help="folder to write; must not exist or be empty"
    )
    export.set_defaults(command=_export)
    return parser


def _recipe_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    command: Callable[[argparse.Namespace], int],
    help_text: str,
    epilog: str,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text.capitalize() + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped name ('rlhf recipes') or ./mine.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="changes to the recipe")
    parser.set_defaults(command=command)
    return parser


# ---------------------------------------------------------------- sub-commands


def _train(arguments: argparse.Namespace) -> int:
    from rlhf.interruption import end_with_torchrun
    from trainer.parallel.world import World

    world = World.from_environment()
    end_with_torchrun(world)  # before the imports that take seconds
    from rlhf.compose import load
    from rlhf.evaluation.benchmark import refuse_training_recipe
    from rlhf.preflight import dry_run, run_folder

    refuse_training_recipe(arguments.recipe)
    config = load(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        print(dry_run(config, arguments.recipe))
        return 0
    if world.follows:
        from rlhf.distributed import follow_config

        return follow_config(config)
    run_folder(config, arguments.recipe)
    from rlhf.pipeline import train_config  # only now: what comes before answers without torch

    _show_log()
    print(train_config(config, arguments.recipe).text())
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from rlhf.evaluation import benchmark, explained

    if benchmark.is_benchmark(arguments.recipe):
        print(explained.explain(arguments.recipe, benchmark.load(arguments.recipe, arguments.overrides)))
        return 0
    from rlhf.compose import load
    from rlhf.explain import explain

    print(explain(arguments.recipe, load(arguments.recipe, arguments.overrides)))
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    recipe, overrides = arguments.recipe, arguments.overrides
    if recipe == "compare":
        from rlhf.evaluation.compare import compare, parse

        print(compare(*parse(overrides)))
        return 0
    from rlhf.evaluation import benchmark

    if benchmark.is_benchmark(recipe):
        wanted = benchmark.load(recipe, overrides)
        from rlhf.evaluate import evaluate_benchmark
        from rlhf.reproduce import reproduce

        _show_log()
        print((reproduce if wanted.reproducibility else evaluate_benchmark)(recipe, wanted))
        return 0
    from rlhf.compose import load

    config = load(recipe, overrides)
    from rlhf.pipeline import evaluate_config

    _show_log()
    print(evaluate_config(config))
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from rlhf.replay import replay

    _show_log()
    found = replay(arguments.step, arguments.overrides)
    print(found.text())
    return found.status


def _recipes(arguments: argparse.Namespace) -> int:
    from rlhf.recipe_list import table

    print(table())
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from rlhf.doctor import report

    text, healthy = report()
    print(text)
    return 0 if healthy else 1


def _export(arguments: argparse.Namespace) -> int:
    from rlhf.export import export

    print(export(arguments.run, arguments.to))
    return 0


def _show_log() -> None:
    """What the run says of itself (model, data, sampling, shortages) goes to standard error."""
    import logging
    import os
    import warnings

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of 4-bit products, which nothing uses
    for package in ("rlhf", "rollout", "trainer", "adapters"):
        logging.getLogger(package).setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
