"""Prints the mistakes as a Markdown table."""

from tests.support.bad_inputs import BAD_INPUTS, markdown

for line in markdown(BAD_INPUTS):
    print(line)
