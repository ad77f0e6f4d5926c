"""Reports: what run folders hold, as statistics, tables and figures.

Everything in a report is computed from run folders (`experiments/trainer/run_folder.py`). Nothing
is typed in, except the published figures that stand beside, which name their source.

`statistics.py` has means, differences and correlations with intervals. `style.py` is the look of
all figures: one colour for each method. `tables.py` renders a table as
Markdown, CSV and LaTeX. `decomposition.py` reads and tabulates the runs of
`experiments.decomposition`; `checkpoint_folders.py` compares two Hugging Face folders.
`published.py` holds published figures.
"""
