"""Subcommands of the experiments layer. Bodies are imported when a command runs: ``--help`` must answer at
once."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction


def register(subparsers: _SubParsersAction) -> None:
    """Add train, config, plan-memory, sample, evaluate, export, verify and rerun to the ``fewstep`` command."""
    train = subparsers.add_parser("train", help="train an experiment to the end of its budget (resumes)")
    train.add_argument("experiment", help="e.g. flash/emoji")
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.add_argument("--evaluate", action="store_true", help="measure at the fractions eval.at of the budget")
    train.set_defaults(run=_train)

    config = subparsers.add_parser("config", help="show the resolved configuration and the run's id")
    config.add_argument("experiment")
    config.add_argument("overrides", nargs="*", metavar="key=value")
    config.set_defaults(run=_config)

    memory = subparsers.add_parser("plan-memory", help="what a training needs of each GPU, by role and purpose")
    memory.add_argument("experiment", help="e.g. dmd2/flux2_dev")
    memory.add_argument("overrides", nargs="*", metavar="key=value")
    memory.add_argument("--gpus", type=int, default=1, metavar="N", help="processes that share the work; default: 1")
    memory.set_defaults(run=_plan_memory)

    _register_sample(subparsers)
    _register_evaluate(subparsers)
    _register_export(subparsers)
    verify = _on_a_run(subparsers, "verify", "check a run's identity, inputs, code and numbers from its files")
    verify.set_defaults(run=_verify)
    _register_rerun(subparsers)


def _register_sample(subparsers: _SubParsersAction) -> None:
    sample = _on_a_run(subparsers, "sample", "draw prompts with a run: images and a contact sheet")
    sample.add_argument("prompts", nargs="*", metavar="PROMPT|@FILE", help="default: held-out captions")
    sample.add_argument("--steps", nargs="+", type=int, metavar="N", help="default: eval.steps")
    sample.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    sample.add_argument("--weights", choices=["student", "ema"], help="default: eval.weights")
    sample.add_argument("--teacher-steps", nargs="+", type=int, default=[50], metavar="N", help="0: no teacher")
    sample.add_argument("--teacher-guidance", type=float, default=4.0, metavar="W")
    sample.add_argument("--at", nargs="+", type=int, default=[], metavar="IMAGES", help="of training; default: its end")
    sample.add_argument("--out", metavar="DIR", help="default: samples/prompts-HASH in the run's folder")
    sample.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="key=value")
    sample.set_defaults(run=_sample)


def _register_evaluate(subparsers: _SubParsersAction) -> None:
    evaluate = _on_a_run(subparsers, "evaluate", "measure what is missing and show the values")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="eval.* and execution.*")
    evaluate.add_argument("--finished", action="store_true", help="fail unless the run is trained to its end")
    evaluate.set_defaults(run=_evaluate)


def _register_export(subparsers: _SubParsersAction) -> None:
    export = _on_a_run(subparsers, "export", "write the student and its sampler for diffusers")
    export.add_argument("--out", required=True, metavar="DIR")
    export.add_argument("--weights", choices=["student", "ema"], default="student")
    export.add_argument("--steps", type=int, metavar="N", help="most sampling steps; default: of eval.steps")
    export.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="key=value")
    export.set_defaults(run=_export)


def _register_rerun(subparsers: _SubParsersAction) -> None:
    rerun = _on_a_run(subparsers, "rerun", "train and measure a run again and compare the numbers")
    rerun.add_argument("overrides", nargs="*", metavar="key=value", help="execution.*, e.g. execution.num_threads=1")
    rerun.add_argument(
        "--out", default="out/rerun", metavar="DIR", help="where the second run lies; default: out/rerun"
    )
    rerun.add_argument("--tolerance", type=float, default=0.01, metavar="X", help="relative; default: 0.01")
    rerun.set_defaults(run=_rerun)


def _on_a_run(subparsers: _SubParsersAction, name: str, summary: str) -> ArgumentParser:
    parser = subparsers.add_parser(name, help=summary)
    parser.add_argument("target", metavar="RUN", help="run folder, run id, or an experiment's name")
    parser.add_argument("--runs-dir", metavar="DIR", help="where to look for an id; default: runs")
    return parser


def _train(arguments: Namespace) -> int:
    from experiments.train import train

    return train(arguments.experiment, arguments.overrides, evaluate=arguments.evaluate)


def _config(arguments: Namespace) -> int:
    from core.config import compose, resolve, run_id, to_yaml
    from experiments.needs import missing_needs

    config = resolve(compose(arguments.experiment, arguments.overrides))
    print(f"# run {run_id(config)}\n{to_yaml(config)}", end="")
    for line in missing_needs(config):
        print(f"# missing: {line}")
    return 0


def _plan_memory(arguments: Namespace) -> int:
    from experiments.memory import run_command

    return run_command(arguments)


def _sample(arguments: Namespace) -> int:
    from experiments.sample import run_command

    return run_command(arguments)


def _evaluate(arguments: Namespace) -> int:
    from experiments.evaluate import run_command

    return run_command(arguments)


def _export(arguments: Namespace) -> int:
    from experiments.export import run_command

    return run_command(arguments)


def _verify(arguments: Namespace) -> int:
    from experiments.verify import run_command

    return run_command(arguments)


def _rerun(arguments: Namespace) -> int:
    from experiments.rerun import run_command

    return run_command(arguments)
