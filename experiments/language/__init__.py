"""Fine-tuning a decoder on answers, and comparing answers by their likelihood.

`answers.py` encodes prompts and answers, makes training batches in buckets of length, and holds the
loss on the answer's tokens. `scoring.py` computes the log-likelihood of the options of questions.
`answering.py` generates answers to instructions. `runs.py` trains one method at one learning rate
with one seed and keeps what it leaves; `table.py` makes the table of many such runs.
"""
