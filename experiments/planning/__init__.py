"""Training steps planned for devices that are not there: memory, work, traffic and time.

`program` compiles the step; `collectives` and `operations` count what is in it; `slices` knows the
devices; `estimate` puts both together; `report` prints it.
"""
