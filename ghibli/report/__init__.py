"""The HTML report of a run, a study, or several runs."""
