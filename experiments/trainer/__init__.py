"""Training: one trainer for every experiment, and what it stands on.

A script says what differs: the model, the batches, the loss, the figures of an evaluation. `fit`
does the rest::

    import dora_jax as dora
    from experiments.trainer.loop import Training, fit
    from experiments.trainer.settings import TrainerSettings

    training = Training(
        model=model,  # adapted
        optimizer=nnx.Optimizer(model, dora.dora_optimizer(1e-3), wrt=dora.DoRAParam),
        loss=loss,  # loss(model, batch) -> (mean loss, {"accuracy": ...})
        batches=batches,  # a Grain iterator of pytrees of NumPy arrays
        steps=1000,
        config=config,  # of the adapters: checkpoints are saved
        evaluate=lambda model: {"loss": ...},
        evaluate_every=100,
        best="loss",
    )
    fit(training, folder, TrainerSettings(mesh="fsdp=8", microbatches=4))

`loop.py` is the loop, `step.py` one compiled step, `settings.py` the options that every script has.
`mesh.py` and `placement.py` put models and batches on devices, `distributed.py` joins the processes
of several hosts. `finite.py` is the guard against a training that diverges, `signals.py` is what
happens on SIGTERM and Ctrl-C. `progress.py` and `flops.py` make the progress line, `trace.py` the
trace for XProf. `run_folder.py` says what a run leaves. `compile_cache.py`, `memory.py` and
`command_line.py` set up the process.

`classification.py` trains classifiers of texts with it, by the methods of `methods.py`: a new
method is one more entry in `METHODS`. `runs.py` keeps the results of many runs, `plots.py` draws
them. Many runs in one program are `experiments/sweeps`.
"""
