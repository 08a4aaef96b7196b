"""Subcommands of the experiments layer. Bodies are imported when a command runs: ``--help`` must answer at
once."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace, _SubParsersAction
from pathlib import Path

from experiments.completion import SHELLS, completed_by, experiment_names, target_names
from experiments.formats import KEYS, LOADED_AS
from experiments.listing import KINDS
from experiments.parser import add_command

EXPERIMENT = "a name of `fewstep list experiments`, or a YAML file of one's own"
OVERRIDES = "values in place of the experiment's, e.g. seed=1; the keys: fewstep config EXPERIMENT"
SETTINGS = "eval.* and execution.* in place of the run's; of an experiment, any value"
WEIGHTS = ("student", "ema")
OUT = "a folder, new or of an earlier export"
RUN = "a run's folder or id"
TARGET = "a run's folder or id, or an experiment's name, whose own run is meant"


def register(subparsers: _SubParsersAction) -> None:
    """Add list, train, config, plan-memory, bench, sample, evaluate, export, push, verify, rerun and completion."""
    listing = add_command(subparsers, "list", "what can be named on the command line, with one line each")
    listing.add_argument(
        "kind", nargs="?", choices=KINDS, metavar="KIND", help="one kind alone, e.g. experiments; default: all"
    )
    listing.set_defaults(run=_list)

    train = _on_an_experiment(subparsers, "train", "train an experiment to the end of its budget (resumes)")
    train.add_argument("--evaluate", action="store_true", help="measure at the fractions eval.at of the budget")
    train.set_defaults(run=_train)

    config = _on_an_experiment(subparsers, "config", "show the resolved configuration and the run's id")
    config.set_defaults(run=_config)

    memory = _on_an_experiment(subparsers, "plan-memory", "what a training needs of each GPU, by role and purpose")
    memory.add_argument("--gpus", type=int, default=1, metavar="N", help="processes that share the work; default: 1")
    memory.set_defaults(run=_plan_memory)

    _register_bench(subparsers)
    _register_sample(subparsers)
    _register_evaluate(subparsers)
    _register_export(subparsers)
    _register_push(subparsers)
    verify = _on_a_run(subparsers, "verify", "check a run's identity, inputs, code and numbers from its files", RUN)
    verify.set_defaults(run=_verify)
    _register_rerun(subparsers)
    completion = add_command(subparsers, "completion", "print what a shell needs to complete fewstep's words at a tab")
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    completion.set_defaults(run=_completion)


def _on_an_experiment(subparsers: _SubParsersAction, name: str, summary: str) -> ArgumentParser:
    parser = add_command(subparsers, name, summary)
    experiment = parser.add_argument("experiment", metavar="EXPERIMENT", help=EXPERIMENT)
    completed_by(experiment, experiment_names, files="yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES)
    return parser


def _on_a_run(subparsers: _SubParsersAction, name: str, summary: str, target: str) -> ArgumentParser:
    parser = add_command(subparsers, name, summary)
    completed_by(parser.add_argument("target", metavar="RUN", help=target), target_names)
    parser.add_argument("--runs-dir", metavar="DIR", help="where to look for an id; default: runs")
    return parser


def _register_bench(subparsers: _SubParsersAction) -> None:
    bench = add_command(subparsers, "bench", "measure what a training step costs: speed, evaluations, memory")
    name = "default: flash/emoji; with --memory a UNet of 50M parameters"
    experiment = bench.add_argument("experiment", nargs="?", metavar="EXPERIMENT", help=name)
    completed_by(experiment, experiment_names, files="yaml")
    bench.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES)
    bench.add_argument("--repeats", type=int, default=5, metavar="N", help="measured periods; default: 5")
    bench.add_argument("--stage", type=float, default=0.9, metavar="X", help="fraction of the budget; default: 0.9")
    bench.add_argument("--memory", action="store_true", help="compare backbone.sharing=lora and full")
    bench.add_argument("--versus", nargs="+", metavar="key=value", help="compare with this setting")
    bench.add_argument("--sampling", nargs="+", type=int, metavar="STEPS", help="time the student's pictures")
    bench.add_argument("--teacher-steps", type=int, default=20, metavar="N", help="beside --sampling; default: 20")
    bench.add_argument("--peak", action="store_true", help=SUPPRESS)  # of one process, for --memory
    bench.add_argument("--only", nargs="+", default=[], metavar="ROW", help="rows of the table; default: all")
    bench.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON, too")
    bench.set_defaults(run=_bench)


def _register_sample(subparsers: _SubParsersAction) -> None:
    sample = _on_a_run(subparsers, "sample", "draw prompts with a run: images and a contact sheet", TARGET)
    prompts = "texts, or files of them, one a line; default: held-out captions"
    sample.add_argument("prompts", nargs="*", default=[], metavar="PROMPT|@FILE", help=prompts)
    sample.add_argument("--steps", nargs="+", type=int, metavar="N", help="of the student; default: eval.steps")
    sample.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="one picture each; default: 0")
    sample.add_argument("--weights", choices=WEIGHTS, help="which of the run's; default: eval.weights")
    teacher_steps = "a column of the teacher for each, 0: none; default: 50"
    sample.add_argument("--teacher-steps", nargs="+", type=int, default=[50], metavar="N", help=teacher_steps)
    guidance = "classifier-free, of the teacher; default: 4"
    sample.add_argument("--teacher-guidance", type=float, default=4.0, metavar="W", help=guidance)
    at = "weights after so many training images; default: at its end"
    sample.add_argument("--at", nargs="+", type=int, default=[], metavar="IMAGES", help=at)
    sample.add_argument("--out", metavar="DIR", help="default: samples/prompts-HASH in the run's folder")
    sample.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="key=value", help=SETTINGS)
    sample.set_defaults(run=_sample)


def _register_evaluate(subparsers: _SubParsersAction) -> None:
    evaluate = _on_a_run(subparsers, "evaluate", "measure what is missing and show the values", TARGET)
    evaluate.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=SETTINGS)
    evaluate.add_argument("--finished", action="store_true", help="fail unless the run is trained to its end")
    evaluate.set_defaults(run=_evaluate)


def _register_export(subparsers: _SubParsersAction) -> None:
    export = _on_a_run(subparsers, "export", "write the student and its sampler for diffusers", TARGET)
    export.add_argument("--out", required=True, metavar="DIR", help=OUT)
    _add_export_options(export)
    export.set_defaults(run=_export)


def _add_export_options(parser: ArgumentParser) -> None:
    """Add the options that ``export`` and ``push`` share."""
    parser.add_argument("--weights", choices=WEIGHTS, help="default: eval.weights")
    parser.add_argument("--steps", type=int, metavar="N", help="most sampling steps; default: of eval.steps")
    keys = "whose keys a LoRA has: diffusers (default), or one file for kohya's scripts or ComfyUI"
    parser.add_argument("--format", choices=KEYS, default="diffusers", help=keys)
    parser.add_argument("--merge", action="store_true", help="a whole pipeline with the student's weights merged in")
    dtype = "how the weights are stored: {}; fp8: linear layers of whole weights; default: as trained"
    parser.add_argument("--dtype", choices=tuple(LOADED_AS), help=dtype.format(", ".join(LOADED_AS)))
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="key=value", help=SETTINGS)


def _register_push(subparsers: _SubParsersAction) -> None:
    push = _on_a_run(subparsers, "push", "export the student and upload it to the Hugging Face hub", TARGET)
    push.add_argument("--to", required=True, metavar="HUB_ID", help="owner/name, made if it does not exist")
    push.add_argument("--private", action="store_true", help="make it visible to its owner alone")
    push.add_argument("--revision", metavar="BRANCH", help="made if it does not exist; default: main")
    push.add_argument("--out", metavar="DIR", help=f"keep what is uploaded: {OUT}")
    _add_export_options(push)
    push.set_defaults(run=_push)


def _register_rerun(subparsers: _SubParsersAction) -> None:
    rerun = _on_a_run(subparsers, "rerun", "train and measure a run again and compare the numbers", RUN)
    rerun.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="execution.*, e.g. execution.num_threads=1"
    )
    out = "where the second run lies; default: out/rerun"
    rerun.add_argument("--out", default="out/rerun", metavar="DIR", help=out)
    rerun.add_argument("--tolerance", type=float, default=0.01, metavar="X", help="relative; default: 0.01")
    rerun.set_defaults(run=_rerun)


def _list(arguments: Namespace) -> int:
    from experiments.listing import run_command

    return run_command(arguments)


def _completion(arguments: Namespace) -> int:
    from experiments.completion import run_command

    return run_command(arguments)


# Names and values are checked before a body is imported: torch takes seconds, a typo is answered at once.


def _train(arguments: Namespace) -> int:
    _check_experiment(arguments)
    _quieten()
    from experiments.train import train

    return train(arguments.experiment, arguments.overrides, evaluate=arguments.evaluate)


def _quieten() -> None:
    from experiments.quiet import quieten

    quieten()


def _check_experiment(arguments: Namespace) -> None:
    from core.config import compose

    compose(arguments.experiment, arguments.overrides)


def _config(arguments: Namespace) -> int:
    from core.config import compose, resolve, run_id, to_yaml
    from experiments.needs import missing_needs

    config = resolve(compose(arguments.experiment, arguments.overrides))
    print(f"# run {run_id(config)}\n{to_yaml(config)}", end="")
    for line in missing_needs(config):
        print(f"# missing: {line}")
    return 0


def _plan_memory(arguments: Namespace) -> int:
    _check_experiment(arguments)
    _quieten()
    from experiments.memory import run_command

    return run_command(arguments)


def _bench(arguments: Namespace) -> int:
    if arguments.experiment:
        _check_experiment(arguments)
    _quieten()
    from experiments.bench.command import run_command

    return run_command(arguments)


def _sample(arguments: Namespace) -> int:
    _check_target(arguments)
    _quieten()
    from experiments.sample import run_command

    return run_command(arguments)


def _check_target(arguments: Namespace) -> None:
    from experiments.target import open_target

    open_target(arguments.target, arguments.overrides, arguments.runs_dir)


def _evaluate(arguments: Namespace) -> int:
    _check_target(arguments)
    _quieten()
    from experiments.evaluate import run_command

    return run_command(arguments)


def _export(arguments: Namespace) -> int:
    _check_export(arguments)
    _quieten()
    from experiments.export import run_command

    return run_command(arguments)


def _check_export(arguments: Namespace) -> None:
    from experiments.formats import check_export
    from experiments.target import open_target

    run = open_target(arguments.target, arguments.overrides, arguments.runs_dir)
    check_export(run.config, arguments, run.id)


def _push(arguments: Namespace) -> int:
    from experiments.push import check_hub, run_command

    check_hub(arguments.to)
    _check_export(arguments)
    return run_command(arguments)


def _verify(arguments: Namespace) -> int:
    _check_run(arguments)
    from experiments.verify import run_command

    return run_command(arguments)


def _check_run(arguments: Namespace) -> None:
    from core.run import Run

    Run.open(arguments.target, arguments.runs_dir or "runs")


def _rerun(arguments: Namespace) -> int:
    _check_run(arguments)
    _quieten()
    from experiments.rerun import run_command

    return run_command(arguments)
