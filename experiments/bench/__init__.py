"""Speed and memory: ``fewstep bench [EXPERIMENT] [key=value ...]``.

Without an experiment: the table of ``rows``, ours against reference steps and the cheap commands, in one run. With one:
the cost of its training step. Efficiency = time of a period's network evaluations, replayed alone / time of the
period's whole iterations; both are measured in turn, since machines are noisy. The data are noise: only sizes matter.
``--memory``: the peak of what one process holds with adapters and with copies. ``--versus``: two settings, each in
processes of its own. ``--sampling``: pictures from prompts to pixels, teacher and student.
"""
