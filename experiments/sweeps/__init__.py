"""Many training runs in one program: seeds, learning rates, alphas and ranks at once.

K members are trained by `jax.vmap` over their adapters, optimiser states, batches and dropout keys,
over one frozen base. The products with the base are one matrix product for all of them.

A task implements `SweepTask` (`task.py`; `text_task.py` is an example): it builds the model, gives
batches for a seed, the loss, and predictions with their scores. Then

    settings = SweepSettings(experiment="glue", folder=Path("runs"), epochs=2, members=8)
    sweep = Sweep(task, settings)
    summaries = sweep.run([Member(method="dora", rank=8, learning_rate=r, seed=s) ...])
    scores = sweep.test(chosen)

trains the members that are not finished, as many at once as `members` says, and leaves a run folder
for each. Members that share shapes are a family, and one compilation serves all of a family: rates,
seeds, alphas, ratios and decays are arrays of the program, and smaller ranks are padded with zeros.
Full fine-tuning goes the same way, by default with one member at a time. `choice.tune` chooses the
learning rate of each setting on the validation examples, trains more seeds at it, and tests these.

A sweep that is interrupted continues: finished members are kept, and those in training go on from
the step after which the signal came, or from the last two minutes.

`members.py` says what a member is and stacks arrays, `program.py` compiles, `chunk.py` trains a
group of members, `runner.py` is `Sweep`, `saved.py` writes arrays. `grid.py` reads `--sweep`,
`studies.py` has the settings of the ablation, `estimate.py` is for dry runs, and `figures.py`
measures what members cost together and alone.
"""

from experiments.sweeps.members import Member
from experiments.sweeps.runner import Sweep, SweepSettings
from experiments.sweeps.task import Scores, SweepTask

__all__ = ["Member", "Scores", "Sweep", "SweepSettings", "SweepTask"]
