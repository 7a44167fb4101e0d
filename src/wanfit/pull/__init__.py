"""A model from the Hugging Face hub, made into a store: `wanfit pull`.

hub.py         what a repository holds, one request to it, and what its refusals mean
transfer.py    ranges of one file, over several connections, until they are all here
cache.py       the hub's cache on this disk: what is there, what we put there, taken away again
layout.py      which files of a repository a model needs
survey.py      the headers of all files before the files, so that all is checked first
model.py       the whole: survey, free disk, download, conversion, tidying up
"""

from wanfit.pull.model import PullReport, PullStep, pull_model

__all__ = ["PullReport", "PullStep", "pull_model"]
