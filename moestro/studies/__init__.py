"""One file a study: a paper's claim put to the test on a laptop, with the control that could refute it.

A study file `moestro/studies/<paper>[_part].py` defines `STUDY = Study(...)`; `_framework` holds the nouns, `_runner`
runs and records, `_results` reads what was recorded.
"""
